"""A decoder layer as family-independent tensors: the stored tensors of a layer taken apart, and joined again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intraslice.layers.weights import AttentionWeights, FFNWeights
from intraslice.runtime.families_intraslice import FamilySpec, LayerShape, Slot


@dataclass(frozen=True, kw_only=True)
class NeutralLayer:
    """One decoder layer as family-independent tensors.

    Attributes:
        attention: weights of the attention block.
        ffn: weights of the FFN.
        rest: norms and whatever else the layer holds, by name relative to the layer.
        rope_pairs: int64 [K, r / 2], kept pairs of each kv head; None when all are kept or there is no RoPE.
        shape: of the layer.
    """

    attention: AttentionWeights
    ffn: FFNWeights
    rest: dict[str, Tensor]
    rope_pairs: Tensor | None
    shape: LayerShape


def split_layer(tensors: dict[str, Tensor], spec: FamilySpec, shape: LayerShape) -> NeutralLayer:
    """Take a layer's stored tensors apart.

    Args:
        tensors: by name relative to the layer.
        spec: the family.
        shape: of the layer.
    """
    rest = dict(tensors)
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    qk, v = shape.qk_head_dim, shape.v_head_dim
    sizes = {"q": heads * qk, "k": kv_heads * qk, "v": kv_heads * v}
    sizes |= {"gate": shape.intermediate_size, "up": shape.intermediate_size}

    def take(module: str, slot: Slot) -> tuple[Tensor, Tensor | None]:
        path = _join(module, slot.path)
        weight, bias = tensors[f"{path}.weight"], tensors.get(f"{path}.bias")
        rest.pop(f"{path}.weight", None)
        rest.pop(f"{path}.bias", None)
        if slot.parts:
            rows = [sizes[part] for part in slot.parts]
            weight = weight.split(rows)[slot.part]
            bias = None if bias is None else bias.split(rows)[slot.part]
        return weight, bias

    def headed(slot: Slot, count: int, width: int) -> tuple[Tensor, Tensor | None]:
        weight, bias = take(spec.attention, slot)
        return weight.reshape(count, width, -1), None if bias is None else bias.reshape(count, width)

    q, q_bias = headed(spec.q, heads, qk)
    k, k_bias = headed(spec.k, kv_heads, qk)
    value, v_bias = headed(spec.v, kv_heads, v)
    o, o_bias = take(spec.attention, spec.o)
    up, up_bias = take(spec.mlp, spec.up)
    gate, gate_bias = (None, None) if spec.gate is None else take(spec.mlp, spec.gate)
    down, down_bias = take(spec.mlp, spec.down)
    pairs = rest.pop(f"{spec.attention}.rope_index", None)
    rest.pop(f"{spec.attention}.head_slot", None)
    return NeutralLayer(
        attention=AttentionWeights(q=q, k=k, v=value, o=o, q_bias=q_bias, k_bias=k_bias, v_bias=v_bias, o_bias=o_bias),
        ffn=FFNWeights(up=up, gate=gate, down=down, up_bias=up_bias, gate_bias=gate_bias, down_bias=down_bias),
        rest=rest,
        rope_pairs=pairs,
        shape=shape,
    )


def join_layer(layer: NeutralLayer, spec: FamilySpec) -> dict[str, Tensor]:
    """Return the state dict of a stock layer: inverse of `split_layer`, without index buffers."""
    attention, ffn = layer.attention, layer.ffn

    def flat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.flatten()

    slots: list[tuple[str, Slot, Tensor, Tensor | None]] = [
        (spec.attention, spec.q, attention.q.flatten(0, 1), flat(attention.q_bias)),
        (spec.attention, spec.k, attention.k.flatten(0, 1), flat(attention.k_bias)),
        (spec.attention, spec.v, attention.v.flatten(0, 1), flat(attention.v_bias)),
        (spec.attention, spec.o, attention.o, attention.o_bias),
        (spec.mlp, spec.up, ffn.up, ffn.up_bias),
        (spec.mlp, spec.down, ffn.down, ffn.down_bias),
    ]
    if spec.gate is not None and ffn.gate is not None:
        slots.append((spec.mlp, spec.gate, ffn.gate, ffn.gate_bias))
    parts: dict[str, list[tuple[int, Tensor, Tensor | None]]] = {}
    for module, slot, weight, bias in slots:
        parts.setdefault(_join(module, slot.path), []).append((slot.part, weight, bias))
    tensors = dict(layer.rest)
    for path, found in parts.items():
        found.sort(key=lambda part: part[0])
        tensors[f"{path}.weight"] = torch.cat([weight for _, weight, _ in found]).contiguous()
        biases = [bias for _, _, bias in found if bias is not None]
        if biases:
            tensors[f"{path}.bias"] = torch.cat(biases).contiguous()
    return tensors


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
