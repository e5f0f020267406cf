"""One tiny configuration for each family of the table; each switches on what is special about the family."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from intraslice.runtime.configuration_intraslice import family_of, known_families
from intraslice.runtime.families_intraslice import FAMILIES, FamilySpec

_COMMON: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_WINDOWS = ["full_attention", "sliding_attention"] * 2
_SLIDING = {"use_sliding_window": True, "sliding_window": 5, "layer_types": _WINDOWS}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_NO_DROPOUT = {"residual_dropout": 0.0}
_PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
_FALCON = {"bias": True, "ffn_hidden_size": 48, "num_key_value_heads": None, "tie_word_embeddings": True}

CASES: dict[str, dict[str, Any]] = {
    "llama": _BIASES,
    "mistral": {"sliding_window": 5},
    "qwen2": _SLIDING,
    "phi3": {"sliding_window": 6, "original_max_position_embeddings": 64, **_PARTIAL},
    "opt": {"num_key_value_heads": None, "ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0},
    "seed_oss": {"head_dim": 12, "attention_out_bias": True, **_BIASES, **_NO_DROPOUT},
    "starcoder2": {"sliding_window": 5, "use_bias": True, "embedding_dropout": 0.0, **_NO_DROPOUT},
    "arcee": _BIASES,
    "cwm": {"head_dim": 12, "sliding_window": 5, "layer_types": _WINDOWS},
    "ministral": {"head_dim": 12, "sliding_window": 5, "layer_types": _WINDOWS},
    "ministral3": {
        "head_dim": 12,
        "sliding_window": 7,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            # The text of the tests goes beyond it, so that queries have a temperature.
            "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.7,
        },
    },
    "gemma": {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    "internlm3": {"head_dim": 12, **_BIASES},
    "jais2": _BIASES,
    "olmo": {"attention_bias": True},
    "stablelm": {"use_qkv_bias": True, "hidden_dropout": 0.0, **_PARTIAL},
    "nemotron": {**_BIASES, **_PARTIAL},
    "vaultgemma": {
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": 5,
        "layer_types": _WINDOWS[::-1],
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "smollm3": {
        **_BIASES,
        "no_rope_layers": [1, 0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": _WINDOWS,
    },
    "qwen3": {"head_dim": 12, "attention_bias": True, **_SLIDING},
    "qwen3_vl_text": {
        "head_dim": 8,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500.0,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    },
    "granite": {
        **_BIASES,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
    },
    "gemma2": {
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": 5,
        "layer_types": _WINDOWS,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": 5,
        "layer_types": _WINDOWS,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 900.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        "tie_word_embeddings": True,
    },
    "olmo2": {"attention_bias": True},
    "olmo3": {"attention_bias": True, "sliding_window": 5, "layer_types": _WINDOWS},
    "exaone4": {"sliding_window": 5, "layer_types": _WINDOWS},
    "hunyuan_v1_dense": {"head_dim": 12, "attention_bias": True},
    "glm": {"head_dim": 12, "attention_bias": True, **_PARTIAL},
    "glm4": {"head_dim": 12, "attention_bias": True, **_PARTIAL},
    "ernie4_5": {"head_dim": 12, "use_bias": True},
    "helium": {"head_dim": 8, "attention_bias": True},
    "cohere": {"logit_scale": 0.7, "attention_bias": True},
    "cohere2": {"logit_scale": 0.7, "attention_bias": True, "sliding_window": 5, "layer_types": _WINDOWS},
    "gpt_neox": {"num_key_value_heads": None, "hidden_dropout": 0.0, "hidden_act": "gelu", **_PARTIAL},
    "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, **_PARTIAL},
    "falcon": _FALCON,
    "falcon two norms": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon one norm": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "falcon sequential": {**_FALCON, "multi_query": False, "parallel_attn": False},
    "gpt2": {
        "num_key_value_heads": None,
        "n_inner": None,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": True,
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    },
}
"""By family; where a family has variants that its config switches, more of them, with words behind its name."""
assert {case.split()[0] for case in CASES} == FAMILIES.keys(), "every row of the table is tested"
KNOWN_FAMILIES = known_families()
"""Those that the installed transformers has; `since` of the others says which release does."""

KNOWN_CASES = [case for case in CASES if case.split()[0] in KNOWN_FAMILIES]


def family_config(case: str, **overrides: Any) -> Any:
    return CONFIG_MAPPING[case.split()[0]](**{**_COMMON, **CASES[case], **overrides})


def spec_of(case: str) -> FamilySpec:
    """Return the row of the table for a case."""
    return family_of(family_config(case))


def family_model(case: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """Stock model with weights large enough that attention is far from uniform; biases and norms are not trivial."""
    model = AutoModelForCausalLM.from_config(family_config(case, **overrides), dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@contextmanager
def doubles():
    """Let code that asks for float32 have float64, so that norms and softmax of stock classes can be compared."""
    single, to_single = torch.float32, torch.Tensor.float
    # Two names of one dtype; transformers 5.16 uses the short one.
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32 = torch.float = single
        torch.Tensor.float = to_single
