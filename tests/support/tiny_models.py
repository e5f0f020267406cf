"""Tiny dense configs of every family and random pruned models of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

from intraslice.runtime.configuration_intraslice import dense_shape, pruned_config
from intraslice.runtime.families_intraslice import FAMILIES, LayerShape
from intraslice.runtime.modeling_intraslice import PrunedAttention

VOCAB = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

CASES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama-mha": (LlamaConfig, {"intermediate_size": 48}),
    "llama-gqa-biases": (
        LlamaConfig,
        {"num_key_value_heads": 2, "intermediate_size": 48, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-wide-heads": (
        LlamaConfig,
        {"num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 48, "rope_parameters": ROPE},
    ),
    "llama-llama3-rope": (
        LlamaConfig,
        {"num_key_value_heads": 2, "intermediate_size": 48, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama-dynamic-rope": (
        LlamaConfig,
        {
            "intermediate_size": 48,
            "max_position_embeddings": 8,
            "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0},
        },
    ),
    "mistral-gqa-window": (
        MistralConfig,
        {"num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 5},
    ),
    "mistral-mha": (
        MistralConfig,
        {"num_key_value_heads": 4, "intermediate_size": 48, "sliding_window": None},
    ),
    "qwen2-gqa": (Qwen2Config, {"num_key_value_heads": 2, "intermediate_size": 48}),
    "qwen2-mha-some-windows": (
        Qwen2Config,
        {
            "num_key_value_heads": 4,
            "intermediate_size": 48,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "phi3-mha": (Phi3Config, {"intermediate_size": 48}),
    "phi3-gqa-partial-rope": (
        Phi3Config,
        {
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "sliding_window": 6,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        },
    ),
    "opt": (OPTConfig, {"ffn_dim": 48, "dropout": 0.0}),
    "opt-norm-after": (
        OPTConfig,
        {"ffn_dim": 48, "dropout": 0.0, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
    "opt-no-bias": (OPTConfig, {"ffn_dim": 48, "dropout": 0.0, "enable_bias": False}),
}
ONE_PER_FAMILY = ("llama-gqa-biases", "mistral-gqa-window", "qwen2-gqa", "phi3-gqa-partial-rope", "opt")


def dense_config_of(case: str, **overrides: Any) -> PretrainedConfig:
    config_class, values = CASES[case]
    return config_class(**{**COMMON, **values, **overrides})


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that attention is far from uniform and every wrong index shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5 * 1.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)


def dense_model(case: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> Any:
    config = dense_config_of(case)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
    randomise(model)
    return model


def ragged_shapes(config: PretrainedConfig) -> list[LayerShape]:
    """Three layers: ragged groups with r > p; equal groups with r < p and odd p; one head and all pairs."""
    dense = dense_shape(config, FAMILIES[config.model_type])
    group, kv_heads, width = dense.heads_per_kv[0], dense.num_key_value_heads, dense.qk_head_dim
    ragged = (group, *(max(1, group - 1 - i) for i in range(kv_heads - 1)))
    return [
        LayerShape(heads_per_kv=ragged, qk_head_dim=width - 2, v_head_dim=width - 3, intermediate_size=40),
        LayerShape(
            heads_per_kv=(max(1, group - 1),) * max(1, kv_heads - 1),
            qk_head_dim=width // 2,
            v_head_dim=width - 1,
            intermediate_size=7,
        ),
        LayerShape(heads_per_kv=(1,), qk_head_dim=width, v_head_dim=width // 2, intermediate_size=48),
    ]


def pruned_model(case: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **overrides: Any) -> Any:
    dense = dense_config_of(case, **overrides)
    spec = FAMILIES[dense.model_type]
    config = pruned_config(dense, spec, ragged_shapes(dense), method="random", recipe={"seed": 0})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
    randomise(model)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, PrunedAttention) and module.rope_index is not None:
            pairs = dense_shape(dense, spec).qk_head_dim // 2
            kept = module.qk_head_dim // 2
            rows = [torch.randperm(pairs, generator=generator)[:kept] for _ in range(module.num_kv_heads)]
            module.set_rope_pairs(torch.stack(rows))
    return model


def tokens(batch: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(2))
