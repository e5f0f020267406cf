"""Shapes, families and configs of pruned models.

This file travels with every pruned checkpoint (`trust_remote_code=True`), so it may import only the standard
library, torch, transformers and huggingface_hub.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What one decoder layer looks like.

    Attributes:
        heads_per_kv: number of query heads of each kv head; its length is num_key_value_heads, its sum
            num_attention_heads; entries may differ (ragged groups).
        qk_head_dim: width of a query/key head (even when the family has RoPE).
        v_head_dim: width of a value head, and of a head's part of the context.
        intermediate_size: FFN channels.
    """

    heads_per_kv: tuple[int, ...]
    qk_head_dim: int
    v_head_dim: int
    intermediate_size: int

    @property
    def num_attention_heads(self) -> int:
        """Number of query heads."""
        return sum(self.heads_per_kv)

    @property
    def num_key_value_heads(self) -> int:
        """Number of key/value heads."""
        return len(self.heads_per_kv)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "heads_per_kv": list(self.heads_per_kv)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerShape:
        """Inverse of `to_dict`."""
        return cls(**{**data, "heads_per_kv": tuple(data["heads_per_kv"])})


@dataclass(frozen=True)
class Slot:
    """Where one matrix lives inside a block: a Linear, or one part of a fused Linear.

    Attributes:
        path: name of the Linear relative to the block.
        part: which part of a fused Linear, in the order of its rows.
        parts: names of all parts when fused, for example ("q", "k", "v"); empty when not fused.
    """

    path: str
    part: int = 0
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """Where things are in one Hugging Face layout. Data only.

    Attributes:
        name: the Hugging Face model_type.
        layers: path of the decoder layers in the ForCausalLM class.
        attention: attention module relative to the layer.
        q, k, v, o: projections relative to the attention module.
        mlp: FFN module relative to the layer; "" when its Linears sit on the layer itself.
        up, gate, down: FFN projections relative to the FFN module; gate is None when the FFN is not gated.
        activation: config attribute that names the activation function.
        attention_norm, ffn_norm: norms relative to the layer.
        norm_first: config attribute that says whether norms come before the block; None means always before.
        rope: whether query and key are rotated.
        intermediate_size: config attribute of the FFN width.
        sliding_window: config attribute passed on to the attention kernel, or None.
        qkv_bias, o_bias: whether the projections have biases: a constant, or a config attribute.
    """

    name: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    q: Slot = Slot("q_proj")
    k: Slot = Slot("k_proj")
    v: Slot = Slot("v_proj")
    o: Slot = Slot("o_proj")
    mlp: str = "mlp"
    up: Slot = Slot("up_proj")
    gate: Slot | None = Slot("gate_proj")
    down: Slot = Slot("down_proj")
    activation: str = "hidden_act"
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    norm_first: str | None = None
    rope: bool = True
    intermediate_size: str = "intermediate_size"
    sliding_window: str | None = None
    qkv_bias: bool | str = False
    o_bias: bool | str = False

    def num_parameters(self, shape: LayerShape, hidden_size: int) -> int:
        """Return the number of linear weights (no biases, no norms) of a layer of this shape."""
        heads = shape.num_attention_heads + shape.num_key_value_heads
        ffn_matrices = 2 if self.gate is None else 3
        return hidden_size * (
            heads * (shape.qk_head_dim + shape.v_head_dim) + ffn_matrices * shape.intermediate_size
        )


FAMILIES: dict[str, FamilySpec] = {
    spec.name: spec
    for spec in (
        FamilySpec(name="llama", qkv_bias="attention_bias", o_bias="attention_bias"),
        FamilySpec(name="mistral", sliding_window="sliding_window"),
        FamilySpec(name="qwen2", sliding_window="sliding_window", qkv_bias=True),
        FamilySpec(
            name="phi3",
            q=Slot("qkv_proj", 0, ("q", "k", "v")),
            k=Slot("qkv_proj", 1, ("q", "k", "v")),
            v=Slot("qkv_proj", 2, ("q", "k", "v")),
            gate=Slot("gate_up_proj", 0, ("gate", "up")),
            up=Slot("gate_up_proj", 1, ("gate", "up")),
            sliding_window="sliding_window",
        ),
        FamilySpec(
            name="opt",
            layers="model.decoder.layers",
            o=Slot("out_proj"),
            mlp="",
            up=Slot("fc1"),
            gate=None,
            down=Slot("fc2"),
            activation="activation_function",
            attention_norm="self_attn_layer_norm",
            ffn_norm="final_layer_norm",
            norm_first="do_layer_norm_before",
            rope=False,
            intermediate_size="ffn_dim",
            qkv_bias="enable_bias",
            o_bias="enable_bias",
        ),
    )
}


def dense_head_dim(config: PretrainedConfig) -> int:
    """Return the head width of the dense model of a stock or a pruned config."""
    # vars(): reading an overridden attribute of a config with per-layer values raises.
    values = vars(config)
    return values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]


def rotary_dim(config: PretrainedConfig) -> int:
    """Return how many channels of a dense head are rotated."""
    rope = vars(config).get("rope_parameters") or {}
    return int(dense_head_dim(config) * rope.get("partial_rotary_factor", 1.0))


def dense_shape(config: PretrainedConfig, spec: FamilySpec) -> LayerShape:
    """Return the shape of every layer of the dense model of a stock or a pruned config."""
    values = vars(config)
    heads = values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads") or heads
    head_dim = dense_head_dim(config)
    return LayerShape(
        heads_per_kv=(heads // kv_heads,) * kv_heads,
        qk_head_dim=head_dim,
        v_head_dim=head_dim,
        intermediate_size=values[spec.intermediate_size],
    )
