"""Prunes one decoder layer: measure, choose, measure again, solve, write, propagate.

Shapes: B sequences of a batch, T tokens, N = B * T, D hidden_size, H query heads, K kv heads, d head_dim,
F intermediate_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from intraslice.algebra.selection import HeadPlan, round_to_multiple
from intraslice.errors import NumericalError
from intraslice.layers.decoder import DecoderLayer, read_attention, read_ffn
from intraslice.layers.surgery import write_attention, write_ffn
from intraslice.layers.weights import attention_shape, fuse_ffn, fuse_qk, fuse_value
from intraslice.methods.blockwise.channels import select_channels, solve_down
from intraslice.methods.blockwise.heads import choose_qk, needs_all_heads, solve_value
from intraslice.methods.blockwise.iter_pca import iterate_pca
from intraslice.methods.blockwise.measure import attention_stats, context_moments, ffn_moments, without_bias
from intraslice.methods.blockwise.options import AttentionOptions, FFNOptions
from intraslice.methods.blockwise.repairs import OutputMoments
from intraslice.runtime.families_intraslice import LayerShape
from intraslice.streaming.hidden import HiddenStates, Streams
from intraslice.streaming.model import StreamedModel


@dataclass(frozen=True)
class LayerBudget:
    """Linear weights that the two blocks of a layer may keep.

    Attributes:
        attention: for q, k, v and o.
        ffn: for up, gate and down, before what attention left over (or overdrew) is added.
        iter_pca: whether Eq. 7 is applied to the FFN.
        heads: exact shape of the attention block; None leaves it to the budget.
        rope_pairs: pairs that all heads of the model keep; None leaves them to each kv head.
    """

    attention: float
    ffn: float
    iter_pca: bool
    heads: HeadPlan | None = None
    rope_pairs: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PrunedLayer:
    """What pruning a layer produced.

    Attributes:
        shape: its new shape.
        heads: kept query heads.
        attention_error, ffn_error: relative squared errors of the two blocks.
        leftover: linear weights of the budget that were not spent (negative when overdrawn).
    """

    shape: LayerShape
    heads: tuple[int, ...]
    attention_error: float
    ffn_error: float
    leftover: float


@torch.no_grad()
def prune_layer(
    model: StreamedModel,
    block: DecoderLayer,
    index: int,
    streams: Streams,
    budget: LayerBudget,
    attention_options: AttentionOptions,
    ffn_options: FFNOptions,
) -> PrunedLayer:
    """Prune the layer in `block` in place, and advance the streams through it.

    Args:
        model: the streamed model the layer belongs to.
        block: the layer at its dense shape.
        index: number of the layer.
        streams: inputs of the layer; overwritten by its outputs.
        budget: weights that may stay.
        attention_options: settings of the attention block.
        ffn_options: settings of the FFN block.

    Raises:
        NumericalError: activations are NaN or infinite, or a system cannot be solved.
    """
    try:
        attention = _prune_attention(model, block, index, streams, budget, attention_options)
        moments = ffn_moments(model, block, streams, ffn_options)
        spent = _attention_cost(model, attention.shape)
        keep = _channels_to_keep(model, budget.ffn + budget.attention - spent, ffn_options.ffn_multiple)
        ffn_error = _prune_ffn(
            model, block, index, streams, moments, attention.shape, keep, budget.iter_pca, ffn_options
        )
        _advance_ffn(block, streams.pruned)
    except NumericalError as error:
        raise NumericalError(f"layer {index}: {error}") from error
    shape = block.attention.shape
    total = model.spec.num_parameters(shape, model.config.hidden_size)
    return PrunedLayer(shape, attention.heads, attention.error, ffn_error, budget.attention + budget.ffn - total)


@torch.no_grad()
def propagate_layer(block: DecoderLayer, hidden: HiddenStates) -> None:
    """Advance one stream through a layer, dense or finished, with the same operations that `prune_layer` uses."""
    for part in hidden.slices():
        hidden.write(part, block.attention_step(hidden.read(part)))
    _advance_ffn(block, hidden)


@dataclass(frozen=True)
class _PrunedAttentionBlock:
    shape: LayerShape
    heads: tuple[int, ...]
    error: float


def _prune_attention(
    model: StreamedModel,
    block: DecoderLayer,
    index: int,
    streams: Streams,
    budget: LayerBudget,
    options: AttentionOptions,
) -> _PrunedAttentionBlock:
    dense = block.attention
    weights = read_attention(block, model.dense_shape)
    stats = attention_stats(model, block, streams.pruned, needs_all_heads(options))
    pairs = model.pairs_to_channels
    edit = choose_qk(weights, stats, budget.attention, options, pairs, budget.heads, budget.rope_pairs)
    trial, per_kv = fuse_qk(weights, edit, pairs)
    ffn_width = model.dense_shape.intermediate_size
    write_attention(block, model.config, index, attention_shape(per_kv, trial, ffn_width), trial, edit.rope_pairs)
    moments = context_moments(model, block, streams, dense, options.target)
    dense_dims = model.dense_shape.num_attention_heads * model.dense_shape.qk_head_dim
    whole = len(edit.heads) * edit.width == dense_dims
    value_edit, error = solve_value(
        trial.o, per_kv, edit.width, moments, options, v_channels=edit.v_channels, whole=whole
    )
    fused = fuse_value(trial, value_edit)
    shape = attention_shape(per_kv, fused, ffn_width, output_bias=value_edit.o_bias is not None)
    write_attention(block, model.config, index, shape, fused, edit.rope_pairs)
    _round_to_saved(model, block.attention)
    return _PrunedAttentionBlock(shape, edit.heads, error)


def _advance_ffn(block: DecoderLayer, hidden: HiddenStates) -> None:
    for part in hidden.slices():
        hidden.write(part, block.ffn_step(hidden.read(part)))


def _attention_cost(model: StreamedModel, shape: LayerShape) -> int:
    return model.spec.num_parameters(replace(shape, intermediate_size=0), model.config.hidden_size)


def _channels_to_keep(model: StreamedModel, budget: float, multiple: int) -> int:
    per_channel = model.config.hidden_size * model.spec.num_ffn_matrices
    width = model.dense_shape.intermediate_size
    return round_to_multiple(budget / per_channel, multiple, min(multiple, width), width)


def _prune_ffn(
    model: StreamedModel,
    block: DecoderLayer,
    index: int,
    streams: Streams,
    moments: OutputMoments,
    shape: LayerShape,
    keep: int,
    iterate: bool,
    options: FFNOptions,
) -> float:
    weights = read_ffn(block, shape)
    channels = select_channels(moments, weights.down, keep, options)
    edit, error = solve_down(moments, weights.down, channels, options)
    if iterate and keep < shape.intermediate_size:
        replay = _Replay(block, streams, weights.down, options.target)
        edit, error = iterate_pca(replay, moments, edit, error, options)
    shape = replace(shape, intermediate_size=keep, output_bias=shape.output_bias or edit.down_bias is not None)
    write_ffn(block, model.config, index, shape, fuse_ffn(weights, edit))
    _round_to_saved(model, block.ffn)
    return error


class _Replay:
    """Replays the outputs of up and gate and the target, batch by batch; nothing is stored."""

    def __init__(self, block: DecoderLayer, streams: Streams, down_weight: Tensor, target: str) -> None:
        self._block = block
        self._streams = streams
        self._target = target
        self._down_weight = down_weight
        self.activation = block.activation

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        block, dense = self._block, self._streams.dense
        for part in self._streams.pruned.slices():
            states = self._streams.pruned.read(part)
            up, gate = block.preactivations(block.ffn_input(states))
            if self._target == "model" and dense is not None:
                # The dense stream is already behind this layer.
                wanted = without_bias(dense.read(part) - states, block.down_projection)
            else:
                act = self.activation(up) if gate is None else self.activation(gate) * up
                wanted = act @ self._down_weight.to(act).T
            yield up.flatten(0, 1), None if gate is None else gate.flatten(0, 1), wanted.flatten(0, 1)


def _round_to_saved(model: StreamedModel, module: torch.nn.Module) -> None:
    """Round weights to the dtype they are stored in, so that later layers, and a resumed run, see what is saved."""
    if model.placement.save_dtype != model.placement.compute_dtype:
        for parameter in module.parameters():
            parameter.copy_(parameter.to(model.placement.save_dtype))
