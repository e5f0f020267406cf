"""Layers brought into the form of a runtime without changing what they compute: zero rows, zero biases, scaled queries.

Padding is exact: a zero row of o_proj or down_proj silences whatever the padded channels hold, and zero rows of q and k
add nothing to the scores.

Shapes: D hidden_size, K kv heads, r qk_head_dim, p v_head_dim, d head_dim of the dense model, F intermediate_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from intraslice.checkpoint.pruned import PrunedCheckpoint
from intraslice.errors import UnsupportedModelError
from intraslice.layers.state_dict import NeutralLayer
from intraslice.layers.weights import AttentionWeights, FFNWeights, rows_of_pairs
from intraslice.runtime.families_intraslice import LayerShape


def pad_layer(
    layer: NeutralLayer, shape: LayerShape, pair_channels: Tensor | None, pairs: Sequence[int] | None = None
) -> NeutralLayer:
    """Scatter a layer into a larger shape with zeros; the layer computes the same with the softmax scale it had.

    Args:
        layer: the layer.
        shape: the larger shape: one group size, qk_head_dim == v_head_dim; without attention where the layer has none.
        pair_channels: channels of each pair of a dense head, [d / 2, 2]; None for a layer without RoPE.
        pairs: dense pairs that the rows of a head of `shape` stand for, ascending; None: all of the dense head. With
            a subset a head's rows are the channels of these pairs, in the order of the family.

    Returns:
        The layer in `shape`; its `rope_pairs` are None.

    Raises:
        UnsupportedModelError: the layer does not fit into `shape`.
    """
    source, ffn = layer.shape, layer.ffn
    group, width = max(shape.heads_per_kv, default=0), shape.qk_head_dim
    fits = source.num_key_value_heads <= shape.num_key_value_heads and max(source.heads_per_kv, default=0) <= group
    if not fits or source.v_head_dim > width or source.intermediate_size > shape.intermediate_size:
        raise UnsupportedModelError(f"a layer of shape {source.to_dict()} does not fit into {shape.to_dict()}.")
    if not shape.has_attention:
        padded = layer.attention
    elif not source.has_attention:
        padded = _silent(layer, shape)
    else:
        padded = _padded_attention(layer, shape, pair_channels, pairs)
    missing = shape.intermediate_size - source.intermediate_size

    def more_rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])

    return NeutralLayer(
        attention=padded,
        ffn=FFNWeights(
            up=_some(more_rows(ffn.up)),
            gate=more_rows(ffn.gate),
            # Zero columns silence the padded channels whatever the activation makes of zero.
            down=torch.cat([ffn.down, ffn.down.new_zeros(ffn.down.shape[0], missing)], dim=1),
            up_bias=more_rows(ffn.up_bias),
            gate_bias=more_rows(ffn.gate_bias),
            down_bias=ffn.down_bias,
        ),
        rest=layer.rest,
        rope_pairs=None,
        shape=shape,
        spec=layer.spec,
    )


def _silent(layer: NeutralLayer, shape: LayerShape) -> AttentionWeights:
    """Return zeros in the place of an attention block that is not there."""
    heads, kv_heads, width = shape.num_attention_heads, shape.num_key_value_heads, shape.qk_head_dim
    attention = layer.attention
    hidden, normed = attention.o.shape[0], layer.spec.qk_norm is not None

    def bias(given: Tensor | None, count: int) -> Tensor | None:
        return None if given is None else given.new_zeros(count, width)

    return AttentionWeights(
        q=attention.q.new_zeros(heads, width, hidden),
        k=attention.k.new_zeros(kv_heads, width, hidden),
        v=attention.v.new_zeros(kv_heads, width, hidden),
        o=attention.o.new_zeros(hidden, heads * width),
        q_bias=bias(attention.q_bias, heads),
        k_bias=bias(attention.k_bias, kv_heads),
        v_bias=bias(attention.v_bias, kv_heads),
        o_bias=attention.o_bias,
        q_norm=attention.q.new_ones(heads, width) if normed else None,
        k_norm=attention.k.new_ones(kv_heads, width) if normed else None,
    )


def _padded_attention(
    layer: NeutralLayer, shape: LayerShape, pair_channels: Tensor | None, pairs: Sequence[int] | None
) -> AttentionWeights:
    source, attention = layer.shape, layer.attention
    group, width = shape.heads_per_kv[0], shape.qk_head_dim
    channels_Kr = _head_channels(layer, pair_channels, pairs, width)
    v_channels = torch.arange(source.v_head_dim)
    kv_of_head = torch.repeat_interleave(torch.tensor(source.heads_per_kv))
    q_channels = channels_Kr[kv_of_head]
    q_places = torch.cat([kv * group + torch.arange(count) for kv, count in enumerate(source.heads_per_kv)])
    kv_places = torch.arange(source.num_key_value_heads)
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads

    def rows(tensor: Tensor | None, count: int, places: Tensor, channels: Tensor) -> Tensor | None:
        if tensor is None:
            return None
        padded = tensor.new_zeros(count, width, *tensor.shape[2:])
        padded[places[:, None], channels] = tensor
        return padded

    o = attention.o.new_zeros(attention.o.shape[0], heads * width)
    o[:, (q_places[:, None] * width + v_channels).flatten()] = attention.o
    v_rows = v_channels.expand(source.num_key_value_heads, -1)
    q_factor, k_factor = _norm_factors(layer, shape)

    def scaled(tensor: Tensor | None, factor: float) -> Tensor | None:
        return tensor if tensor is None or factor == 1.0 else _wide(tensor) * factor

    def divided(norm: Tensor | None, factor: float) -> Tensor | None:
        offset = layer.spec.norm_offset
        return norm if norm is None or factor == 1.0 else (_wide(norm) + offset) / factor - offset

    return AttentionWeights(
        q=_some(scaled(rows(attention.q, heads, q_places, q_channels), q_factor)),
        k=_some(scaled(rows(attention.k, kv_heads, kv_places, channels_Kr), k_factor)),
        v=_some(rows(attention.v, kv_heads, kv_places, v_rows)),
        o=o,
        q_bias=scaled(rows(attention.q_bias, heads, q_places, q_channels), q_factor),
        k_bias=scaled(rows(attention.k_bias, kv_heads, kv_places, channels_Kr), k_factor),
        q_norm=rows(divided(attention.q_norm, q_factor), heads, q_places, q_channels),
        k_norm=rows(divided(attention.k_norm, k_factor), kv_heads, kv_places, channels_Kr),
        v_bias=rows(attention.v_bias, kv_heads, kv_places, v_rows),
        o_bias=attention.o_bias,
    )


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 at least, so that what is rounded afterwards is a product."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _norm_factors(layer: NeutralLayer, shape: LayerShape) -> tuple[float, float]:
    """Return the factors on the rows of query and key with which their norms divide by the same in a larger shape.

    A norm divides x by sqrt(sum x^2 / r + eps). With zeros up to the width d, sqrt(d / r) x is divided by the same
    number; the norm's weight takes the factor back.

    Raises:
        UnsupportedModelError: each head has its own norm, for which stock classes have no place.
    """
    norms, source = layer.spec.qk_norm, layer.shape
    if norms is None:
        return 1.0, 1.0
    if source.headed_qk_norm:
        raise UnsupportedModelError(
            f"the norms of query and key differ from head to head, and the {layer.spec.name} class has one for all; "
            "prune with --target stock, or with attention.qk_width = dense."
        )
    factor = shape.qk_head_dim / source.qk_head_dim
    heads, kv_heads = 1.0, 1.0
    if norms.over == "all":
        heads = shape.num_attention_heads / source.num_attention_heads
        kv_heads = shape.num_key_value_heads / source.num_key_value_heads
    return (factor * heads) ** 0.5, (factor * kv_heads) ** 0.5


def _some(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _head_channels(
    layer: NeutralLayer, pair_channels: Tensor | None, pairs: Sequence[int] | None, width: int
) -> Tensor:
    """Return where each row of a query or key head goes in a head of the larger shape, [K, r]."""
    kv_heads, narrow = layer.shape.num_key_value_heads, layer.shape.qk_head_dim
    if pair_channels is None:
        return torch.arange(narrow).expand(kv_heads, -1)
    num_pairs = pair_channels.shape[0]
    if layer.rope_pairs is not None:
        own = layer.rope_pairs
    elif narrow == 2 * num_pairs and pairs is None:
        # All pairs, in the order of the dense head.
        return torch.arange(narrow).expand(kv_heads, -1)
    else:
        own = torch.arange(num_pairs).expand(kv_heads, -1)
    if pairs is None:
        return rows_of_pairs(pair_channels[own], layer.spec.interleaved)
    place = torch.full((num_pairs,), -1)
    place[list(pairs)] = torch.arange(len(pairs))
    places = place[own]
    if (places < 0).any() or 2 * len(pairs) != width:
        raise UnsupportedModelError("the kept rotary pairs of a head are not among those of the larger shape.")
    both = (2 * places, 2 * places + 1) if layer.spec.interleaved else (places, len(pairs) + places)
    return rows_of_pairs(torch.stack(both, dim=-1), layer.spec.interleaved)


def with_output_biases(layer: NeutralLayer) -> NeutralLayer:
    """Return the layer with zero biases where o_proj or down_proj has none."""
    o, down = layer.attention.o, layer.ffn.down

    def filled(bias: Tensor | None, weight: Tensor) -> Tensor:
        return weight.new_zeros(weight.shape[0]) if bias is None else bias

    return replace(
        layer,
        attention=replace(layer.attention, o_bias=filled(layer.attention.o_bias, o)),
        ffn=replace(layer.ffn, down_bias=filled(layer.ffn.down_bias, down)),
    )


def with_all_biases(layer: NeutralLayer) -> NeutralLayer:
    """Return the layer with zero biases where a projection has none, for classes that have all or none."""
    layer = with_output_biases(layer)

    def filled(weights: Any, names: Sequence[str]) -> Any:
        found = {name: getattr(weights, name) for name in names if getattr(weights, name) is not None}
        missing = [name for name in found if getattr(weights, f"{name}_bias") is None]
        return replace(weights, **{f"{name}_bias": found[name].new_zeros(found[name].shape[:-1]) for name in missing})

    return replace(layer, attention=filled(layer.attention, "qkv"), ffn=filled(layer.ffn, ("up", "gate")))


def scale_queries(layer: NeutralLayer, factor: float) -> NeutralLayer:
    """Multiply the queries, for runtimes whose softmax scale is another one than that of the dense head."""
    attention, offset = layer.attention, layer.spec.norm_offset
    if factor == 1.0:
        # Adding the offset and taking it off again would round.
        return layer
    if attention.q_norm is not None:
        # Whatever comes before a norm has no effect on the size of what comes out.
        norm = (_wide(attention.q_norm) + offset) * factor - offset
        return replace(layer, attention=replace(attention, q_norm=norm))
    bias = None if attention.q_bias is None else _wide(attention.q_bias) * factor
    return replace(layer, attention=replace(attention, q=_wide(attention.q) * factor, q_bias=bias))


def padding_cost(checkpoint: PrunedCheckpoint, shapes: Sequence[LayerShape]) -> float:
    """Return by which fraction the decoder layers' linear weights grow when each layer gets its shape in `shapes`."""

    def total(found: Sequence[LayerShape]) -> int:
        return sum(checkpoint.spec.num_parameters(shape, checkpoint.config.hidden_size) for shape in found)

    return total(shapes) / total(checkpoint.shapes) - 1.0
