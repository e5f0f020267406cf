"""Save a small random model with a tokenizer of bytes: small_model.py FAMILY FOLDER.

For checks of runtimes: heads as wide as their kernels want them, and what is special about the family switched on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from golden import build_tokenizer
from tokenizers import models
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 320,
    "max_position_embeddings": 1024,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_OWN_HEADS = {"hidden_size": 256, "num_key_value_heads": None, "head_dim": None}
FAMILIES: dict[str, dict[str, Any]] = {
    # Norms of query and key.
    "qwen3": {"tie_word_embeddings": False},
    # Norms of outputs, and logits with a cap. Windows longer than the texts: they are another thing.
    "gemma2": {"query_pre_attn_scalar": 48, "sliding_window": 1024, "final_logit_softcapping": 30.0},
    # Both, and windows shorter than the texts, in five of six layers.
    "gemma3_text": {"num_hidden_layers": 6, "query_pre_attn_scalar": 48, "sliding_window": 32},
    # Transposed matrices and learned positions; heads are as wide as hidden_size says.
    "gpt2": {**_OWN_HEADS, "n_inner": 512},
    # One kv head, and parallel blocks.
    "falcon": {**_OWN_HEADS, "ffn_hidden_size": 512},
}


def main() -> None:
    """Build the model and save it."""
    if len(sys.argv) != 3 or sys.argv[1] not in FAMILIES:
        sys.exit(f"usage: small_model.py FAMILY FOLDER, with FAMILY one of {', '.join(FAMILIES)}")
    family, folder = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(0)
    values = {name: value for name, value in {**COMMON, **FAMILIES[family]}.items() if value is not None}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer = build_tokenizer()
    # llama.cpp loads no tokenizer that joins nothing.
    vocab = {**tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False), "th": 259}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocab, merges=[("t", "h")])
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
