"""Tiny seeded models and a tokenizer, built in code: no network, no files in the repository."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES = ("llama", "mistral", "qwen2", "phi3", "opt")
VOCAB_SIZE = 272
BOS, EOS, PAD = 256, 257, 258

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
_GATED: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 64}
_FAMILY: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "mistral": {**_GATED, "sliding_window": None},
    "qwen2": _GATED,
    "phi3": {**_GATED, "original_max_position_embeddings": 128},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    # Stored transposed, and fused by kv head.
    "gpt2": {"n_inner": 64, "tie_word_embeddings": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "falcon": {"ffn_hidden_size": 64, "tie_word_embeddings": True, "bias": True},
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """Stock config of a three-layer model; `overrides` are fields of that config."""
    return CONFIG_MAPPING[family](**{**_COMMON, **_FAMILY[family], **overrides})


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Stock model with weights large enough that layers matter, biases and norms included."""
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.15)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of single bytes: ids 0..255 are bytes, then <s>, </s>, <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_tiny(
    family: str,
    folder: Path | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Save a tiny model with its tokenizer; a new temporary folder unless one is given."""
    folder = folder or Path(tempfile.mkdtemp(prefix=f"tiny-{family}-"))
    tiny_model(family, seed=seed, dtype=dtype, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
