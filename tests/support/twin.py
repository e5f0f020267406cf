"""The zero-padded twin: a pruned model scattered back into the stock class."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from intraslice.runtime.configuration_intraslice import dense_config, dense_shape, rotary_dim
from intraslice.runtime.families_intraslice import FAMILIES, FamilySpec, LayerShape
from intraslice.runtime.modeling_intraslice import PrunedAttention, pair_channels


def zero_pad(model: Any, seed: int = 0) -> Any:
    """Return a stock dense model that computes the same function as a pruned model.

    Kept heads go to random dense heads of the right group structure, rotary channels to their own places; all
    other weights are zero. A removed head then adds nothing, whatever its attention weights are.
    """
    config = dense_config(model.config)
    spec = FAMILIES[config.model_type]
    dense = dense_shape(config, spec)
    twin = AutoModelForCausalLM.from_config(config).to(model.dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    source, state = model.state_dict(), twin.state_dict()
    for name, tensor in state.items():
        tensor.copy_(source[name]) if tensor.shape == source[name].shape else tensor.zero_()
    layers = zip(model.get_submodule(spec.layers), twin.get_submodule(spec.layers), strict=True)
    for (pruned_layer, dense_layer), shape in zip(layers, model.config.layer_shapes, strict=True):
        _scatter_attention(pruned_layer, dense_layer, spec, shape, dense, rotary_dim(config), generator)
        _scatter_ffn(pruned_layer, dense_layer, spec, shape, dense)
    return twin


def _scatter(source: Any, target: Any, rows: torch.Tensor | None, columns: torch.Tensor | None) -> None:
    with torch.no_grad():
        rows = torch.arange(target.out_features) if rows is None else rows
        columns = torch.arange(target.in_features) if columns is None else columns
        target.weight.zero_()
        target.weight[rows[:, None], columns[None]] = source.weight
        if target.bias is not None:
            target.bias.zero_()
            target.bias[rows] = source.bias


def _scatter_attention(
    pruned_layer: Any,
    dense_layer: Any,
    spec: FamilySpec,
    shape: LayerShape,
    dense: LayerShape,
    rotated: int,
    generator: torch.Generator,
) -> None:
    source, target = pruned_layer.get_submodule(spec.attention), dense_layer.get_submodule(spec.attention)
    assert isinstance(source, PrunedAttention)
    group, width = dense.heads_per_kv[0], dense.qk_head_dim
    kv_places = torch.randperm(dense.num_key_value_heads, generator=generator)[: shape.num_key_value_heads]
    q_rows, k_rows, v_rows, o_columns = [], [], [], []
    for kv, (place, size) in enumerate(zip(kv_places.tolist(), shape.heads_per_kv, strict=True)):
        channels = torch.arange(shape.qk_head_dim)
        if source.rope_index is not None:
            channels = pair_channels(rotated, width)[source.rope_index[kv]].T.reshape(-1)
        k_rows.append(place * width + channels)
        v_rows.append(place * width + torch.arange(shape.v_head_dim))
        for head in torch.randperm(group, generator=generator)[:size].tolist():
            q_rows.append((place * group + head) * width + channels)
            o_columns.append((place * group + head) * width + torch.arange(shape.v_head_dim))
    parts = [torch.cat(q_rows), torch.cat(k_rows), torch.cat(v_rows)]
    if spec.q.parts:
        k_start = dense.num_attention_heads * width
        starts = (0, k_start, k_start + dense.num_key_value_heads * width)
        rows = torch.cat([start + part for start, part in zip(starts, parts, strict=True)])
        _scatter(source.get_submodule(spec.q.path), target.get_submodule(spec.q.path), rows, None)
    else:
        for slot, rows in zip((spec.q, spec.k, spec.v), parts, strict=True):
            _scatter(source.get_submodule(slot.path), target.get_submodule(slot.path), rows, None)
    out = (source.get_submodule(spec.o.path), target.get_submodule(spec.o.path))
    _scatter(*out, None, torch.cat(o_columns))


def _scatter_ffn(pruned_layer: Any, dense_layer: Any, spec: FamilySpec, shape: LayerShape, dense: LayerShape) -> None:
    source = pruned_layer.get_submodule(spec.mlp) if spec.mlp else pruned_layer
    target = dense_layer.get_submodule(spec.mlp) if spec.mlp else dense_layer
    kept = torch.arange(shape.intermediate_size)
    for slot in {slot.path: slot for slot in (spec.up, spec.gate) if slot is not None}.values():
        rows = torch.cat([part * dense.intermediate_size + kept for part in range(max(1, len(slot.parts)))])
        _scatter(source.get_submodule(slot.path), target.get_submodule(slot.path), rows, None)
    down = (source.get_submodule(spec.down.path), target.get_submodule(spec.down.path))
    _scatter(*down, None, kept)
