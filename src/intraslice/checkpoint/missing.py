"""What a model has that no family of the table has yet: read from config.json, for the sentence that refuses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_FEATURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("mixtures of experts", _EXPERTS),
    ("latent attention (one low-rank key and value for all heads)", ("kv_lora_rank",)),
    ("a gate on the output of attention", ("attn_output_gate",)),
    ("keys and values that later layers share", ("num_kv_shared_layers",)),
    ("positions as ALiBi slopes", ("alibi",)),
    ("state-space or linear-attention layers", ("mamba_d_state", "ssm_cfg", "linear_num_key_heads", "state_size")),
    ("embeddings per layer", ("hidden_size_per_layer_input",)),
)
# What no field of the config says.
_ARCHITECTURES = {
    "bloom": "positions as ALiBi slopes",
    "mpt": "positions as ALiBi slopes",
    "gpt_bigcode": "one key and value for all heads in a fused matrix, beside a layout by head",
    "gptj": "an attention function of its own",
    "gpt_neo": "an attention function of its own",
}
_PLAIN_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


def missing_features(config: Mapping[str, Any]) -> list[str]:
    """Return in words what a model has that no family of the table has, with the field of config.json that says so.

    Args:
        config: config.json, or the text tower's part of it.
    """
    model_type = str(config.get("model_type", ""))
    found = [_ARCHITECTURES[model_type]] if model_type in _ARCHITECTURES else []
    for words, fields in _FEATURES:
        field = next((field for field in fields if config.get(field)), None)
        if field is not None:
            found.append(f"{words} ({field})")
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        others = sorted({str(kind) for kind in kinds} - set(_PLAIN_LAYERS))
        if others:
            found.append(f"layers that are no attention over all channels ({', '.join(others)})")
    return found
