"""Neutral weights of a layer, from and to its state dict: the one place that knows how the slots of a family lie.

Modules are read and written through it as well (see decoder.py and surgery.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intraslice.layers.weights import AttentionWeights, FFNWeights
from intraslice.runtime.families_intraslice import FamilySpec, LayerShape, Slot, grouped_sizes

Part = tuple[Slot, Tensor, Tensor | None]
"""A slot, its weight and its bias, as they stand in a Linear: [rows, columns] and [rows]."""


@dataclass(frozen=True, kw_only=True)
class NeutralLayer:
    """One decoder layer as family-independent tensors.

    Attributes:
        attention: weights of the attention block.
        ffn: weights of the FFN.
        rest: norms and whatever else the layer holds, by name relative to the layer.
        rope_pairs: int64 [K, r / 2], kept pairs of each kv head; None when all are kept or there is no RoPE.
        shape: of the layer.
        spec: the family.
    """

    attention: AttentionWeights
    ffn: FFNWeights
    rest: dict[str, Tensor]
    rope_pairs: Tensor | None
    shape: LayerShape
    spec: FamilySpec


def _row_counts(shape: LayerShape) -> dict[str, int]:
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    attention = {"q": heads * shape.qk_head_dim, "k": kv_heads * shape.qk_head_dim, "v": kv_heads * shape.v_head_dim}
    return {**attention, "gate": shape.intermediate_size, "up": shape.intermediate_size}


def _take(
    tensors: Mapping[str, Tensor], slot: Slot, counts: Mapping[str, int], shape: LayerShape
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of one part of a (fused) Linear."""
    weight, bias = tensors[f"{slot.path}.weight"], tensors.get(f"{slot.path}.bias")
    if slot.grouped:
        return _ungrouped(weight, slot, shape), None if bias is None else _ungrouped(bias, slot, shape)
    if slot.parts:
        rows = [counts[part] for part in slot.parts]
        weight = weight.split(rows)[slot.part]
        bias = None if bias is None else bias.split(rows)[slot.part]
    return weight, bias


def _ungrouped(rows: Tensor, slot: Slot, shape: LayerShape) -> Tensor:
    """Return the rows of one part of a fused Linear whose rows go by kv head."""
    sizes = [size for group in grouped_sizes(shape) for size in group]
    return torch.cat([rows[:0], *rows.split(sizes)[slot.part :: len(slot.parts)]]) if sizes else rows


def _grouped(parts: Sequence[Tensor], shape: LayerShape) -> Tensor:
    """Return the rows of q, k and v by kv head: inverse of `_ungrouped`."""
    sizes = zip(*grouped_sizes(shape), strict=True)
    by_part = (part.split(list(counts)) for part, counts in zip(parts, sizes, strict=True))
    return torch.cat([rows for group in zip(*by_part, strict=True) for rows in group])


def split_attention(tensors: Mapping[str, Tensor], spec: FamilySpec, shape: LayerShape) -> AttentionWeights:
    """Return the neutral weights of an attention block; they are views of what is given.

    Args:
        tensors: by name relative to the attention module.
        spec: the family.
        shape: of the layer.
    """
    counts = _row_counts(shape)

    def headed(slot: Slot, heads: int, width: int) -> tuple[Tensor, Tensor | None]:
        weight, bias = _take(tensors, slot, counts, shape)
        # Also where there are no heads, which leaves nothing to infer a size from.
        return weight.reshape(heads, width, weight.shape[1]), None if bias is None else bias.reshape(heads, width)

    q, q_bias = headed(spec.q, shape.num_attention_heads, shape.qk_head_dim)
    k, k_bias = headed(spec.k, shape.num_key_value_heads, shape.qk_head_dim)
    v, v_bias = headed(spec.v, shape.num_key_value_heads, shape.v_head_dim)
    o, o_bias = _take(tensors, spec.o, counts, shape)
    norms = {}
    if spec.qk_norm is not None and shape.has_attention:
        # One row a head, also where all heads share one.
        for side, name, rows in (("q_norm", spec.qk_norm.q, q), ("k_norm", spec.qk_norm.k, k)):
            norms[side] = tensors[f"{name}.weight"].reshape(-1, shape.qk_head_dim).expand(len(rows), -1)
    return AttentionWeights(q=q, k=k, v=v, o=o, q_bias=q_bias, k_bias=k_bias, v_bias=v_bias, o_bias=o_bias, **norms)


def split_ffn(tensors: Mapping[str, Tensor], spec: FamilySpec, shape: LayerShape) -> FFNWeights:
    """Return the neutral weights of an FFN; they are views of what is given.

    Args:
        tensors: by name relative to the FFN module.
        spec: the family.
        shape: of the layer.
    """
    counts = _row_counts(shape)
    up, up_bias = _take(tensors, spec.up, counts, shape)
    gate, gate_bias = (None, None) if spec.gate is None else _take(tensors, spec.gate, counts, shape)
    down, down_bias = _take(tensors, spec.down, counts, shape)
    return FFNWeights(up=up, gate=gate, down=down, up_bias=up_bias, gate_bias=gate_bias, down_bias=down_bias)


def attention_parts(weights: AttentionWeights, spec: FamilySpec, shape: LayerShape) -> list[Part]:
    """Return what stands in which slot of an attention module: inverse of `split_attention`, with `join_parts`.

    Args:
        weights: of the block.
        spec: the family.
        shape: of the layer.
    """

    def rows(slot: Slot, weight: Tensor, bias: Tensor | None) -> Part:
        return slot, weight.flatten(0, 1), None if bias is None else bias.flatten()

    reading = [
        rows(spec.q, weights.q, weights.q_bias),
        rows(spec.k, weights.k, weights.k_bias),
        rows(spec.v, weights.v, weights.v_bias),
    ]
    if spec.q.grouped and shape.has_attention:
        biases = [bias for _, _, bias in reading if bias is not None]
        fused = _grouped([weight for _, weight, _ in reading], shape)
        reading = [(Slot(spec.q.path), fused, _grouped(biases, shape) if biases else None)]
    return [*reading, (spec.o, weights.o, weights.o_bias)]


def norm_weights(weights: AttentionWeights, spec: FamilySpec, headed: bool) -> dict[str, Tensor]:
    """Return the weights of the norms of query and key by name relative to the attention module.

    Args:
        weights: of the block.
        spec: the family.
        headed: whether each head has its own (`LayerShape.headed_qk_norm`).
    """
    if spec.qk_norm is None or weights.q_norm is None or weights.k_norm is None:
        return {}

    def stored(norm_Hd: Tensor) -> Tensor:
        if headed:
            return norm_Hd
        return norm_Hd.flatten() if spec.qk_norm is not None and spec.qk_norm.over == "all" else norm_Hd[0]

    return {f"{spec.qk_norm.q}.weight": stored(weights.q_norm), f"{spec.qk_norm.k}.weight": stored(weights.k_norm)}


def ffn_parts(weights: FFNWeights, spec: FamilySpec) -> list[Part]:
    """Return what stands in which slot of an FFN module: inverse of `split_ffn`, with `join_parts`."""
    parts: list[Part] = [(spec.up, weights.up, weights.up_bias), (spec.down, weights.down, weights.down_bias)]
    if spec.gate is not None and weights.gate is not None:
        parts.append((spec.gate, weights.gate, weights.gate_bias))
    return parts


def join_parts(parts: Sequence[Part]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return weight and bias of each Linear, by its path; the parts of a fused one in their order."""
    by_path: dict[str, list[Part]] = {}
    for part in parts:
        by_path.setdefault(part[0].path, []).append(part)
    joined = {}
    for path, found in by_path.items():
        found.sort(key=lambda part: part[0].part)
        biases = [bias for _, _, bias in found if bias is not None]
        joined[path] = torch.cat([weight for _, weight, _ in found]), torch.cat(biases) if biases else None
    return joined


def as_linears(tensors: Mapping[str, Tensor], spec: FamilySpec) -> dict[str, Tensor]:
    """Return the tensors of a stock layer with all matrices as [out, in]; also the way back, where they are [in, out].

    Args:
        tensors: by name relative to the layer.
        spec: the family.
    """
    if not spec.transposed:
        return dict(tensors)
    paths = [path for reading, writing in (spec.attention_paths, spec.ffn_paths) for path in (*reading, writing)]
    matrices = {f"{path}.weight" for path in paths}
    return {name: tensor.T.contiguous() if name in matrices else tensor for name, tensor in tensors.items()}


def below(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """Return the tensors of one module of a layer by name relative to it; "" is the layer itself."""
    prefix = f"{module}." if module else ""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def split_layer(tensors: Mapping[str, Tensor], spec: FamilySpec, shape: LayerShape) -> NeutralLayer:
    """Take a layer's stored tensors apart.

    Args:
        tensors: by name relative to the layer.
        spec: the family.
        shape: of the layer.
    """
    paths = [path for reading, writing in (spec.attention_paths, spec.ffn_paths) for path in (*reading, writing)]
    ours = {f"{path}.{kind}" for path in paths for kind in ("weight", "bias")}
    ours |= {f"{spec.attention}.{name}" for name in ("rope_index", "head_slot")}
    if spec.qk_norm is not None:
        ours |= {f"{spec.attention}.{name}.weight" for name in (spec.qk_norm.q, spec.qk_norm.k)}
    return NeutralLayer(
        attention=split_attention(below(tensors, spec.attention), spec, shape),
        ffn=split_ffn(below(tensors, spec.mlp), spec, shape),
        rest={name: tensor for name, tensor in tensors.items() if name not in ours},
        rope_pairs=tensors.get(f"{spec.attention}.rope_index"),
        shape=shape,
        spec=spec,
    )


def join_layer(layer: NeutralLayer) -> dict[str, Tensor]:
    """Return the state dict of a stock layer: inverse of `split_layer`, without index buffers."""
    tensors, spec = dict(layer.rest), layer.spec
    blocks = (
        (spec.attention, attention_parts(layer.attention, spec, layer.shape)),
        (spec.mlp, ffn_parts(layer.ffn, spec)),
    )
    for module, parts in blocks:
        prefix = f"{module}." if module else ""
        for path, (weight, bias) in join_parts(parts).items():
            tensors[f"{prefix}{path}.weight"] = weight.contiguous()
            if bias is not None:
                tensors[f"{prefix}{path}.bias"] = bias.contiguous()
    for name, weight in norm_weights(layer.attention, spec, layer.shape.headed_qk_norm).items():
        tensors[f"{spec.attention}.{name}"] = weight.contiguous()
    return as_linears(tensors, spec)
