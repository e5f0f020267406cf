"""Prunes one decoder layer: measure, choose, measure again, solve, write, propagate.

Shapes: B sequences of a batch, T tokens, N = B * T, D hidden_size, H query heads, K kv heads, d head_dim,
F intermediate_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from intraslice.blocks import DecoderBlock, read_attention, read_ffn
from intraslice.compressors.attention import AttentionStats, ContextMoments, choose_qk, solve_value
from intraslice.compressors.ffn import FFNMoments, block_target, select_channels, solve_down
from intraslice.compressors.iter_pca import iterate_pca
from intraslice.edits import attention_shape, fuse_ffn, fuse_qk, fuse_value
from intraslice.engine.hidden import HiddenStates
from intraslice.engine.model import StreamedModel
from intraslice.errors import NumericalError
from intraslice.options import AttentionOptions, FFNOptions
from intraslice.runtime.configuration_intraslice import LayerShape
from intraslice.runtime.modeling_intraslice import PrunedAttention
from intraslice.selection import HeadPlan, round_to_multiple
from intraslice.stats import BlockSecondMoment, SecondMoment, Sum
from intraslice.surgery import write_attention, write_ffn


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


@dataclass(frozen=True)
class Streams:
    """Hidden states of all calibration tokens at the input of a layer; each layer overwrites them with its outputs.

    Attributes:
        pruned: as the layers pruned before give them.
        dense: as the dense model has them; None when no block is repaired against the dense model: all blocks are
            then repaired against their own dense output.
    """

    pruned: HiddenStates
    dense: HiddenStates | None


@torch.no_grad()
def prune_layer(
    model: StreamedModel,
    block: DecoderBlock,
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
        moments = _ffn_moments(model, block, index, streams, ffn_options)
        spent = _attention_cost(model, attention.shape)
        keep = _channels_to_keep(model, budget.ffn + budget.attention - spent, ffn_options.ffn_multiple)
        ffn_error = _prune_ffn(
            model, block, index, streams, moments, attention.shape, keep, budget.iter_pca, ffn_options
        )
        _advance_ffn(block, streams.pruned)
    except NumericalError as error:
        raise NumericalError(f"layer {index}: {error}") from error
    shape = replace(attention.shape, intermediate_size=keep)
    total = model.spec.num_parameters(shape, model.config.hidden_size)
    return PrunedLayer(shape, attention.heads, attention.error, ffn_error, budget.attention + budget.ffn - total)


@torch.no_grad()
def propagate_layer(model: StreamedModel, block: DecoderBlock, index: int, hidden: HiddenStates) -> None:
    """Advance one stream through a layer, dense or finished, with the same operations that `prune_layer` uses."""
    for part in hidden.slices():
        hidden.write(part, block.attention_step(hidden.read(part), model.layer_kwargs[index]))
    _advance_ffn(block, hidden)


@dataclass(frozen=True)
class _PrunedAttentionBlock:
    shape: LayerShape
    heads: tuple[int, ...]
    error: float


def _prune_attention(
    model: StreamedModel,
    block: DecoderBlock,
    index: int,
    streams: Streams,
    budget: LayerBudget,
    options: AttentionOptions,
) -> _PrunedAttentionBlock:
    dense = block.attention
    weights = read_attention(block, model.dense_shape)
    stats = _attention_stats(model, block, index, streams.pruned)
    pairs = model.pairs_to_channels
    edit = choose_qk(weights, stats, budget.attention, options, pairs, budget.heads, budget.rope_pairs)
    trial, per_kv = fuse_qk(weights, edit, pairs)
    ffn_width = model.dense_shape.intermediate_size
    write_attention(block, model.config, index, attention_shape(per_kv, trial, ffn_width), trial, edit.rope_pairs)
    moments = _context_moments(model, block, index, streams, dense, options.target)
    dense_dims = model.dense_shape.num_attention_heads * model.dense_shape.qk_head_dim
    whole = len(edit.heads) * edit.width == dense_dims
    value_edit, error = solve_value(trial.o, per_kv, edit.width, moments, options, whole=whole)
    fused = fuse_value(trial, value_edit)
    shape = attention_shape(per_kv, fused, ffn_width)
    write_attention(block, model.config, index, shape, fused, edit.rope_pairs)
    _round_to_saved(model, block.attention)
    return _PrunedAttentionBlock(shape, edit.heads, error)


def _attention_stats(model: StreamedModel, block: DecoderBlock, index: int, hidden: HiddenStates) -> AttentionStats:
    shape, kwargs = model.dense_shape, model.layer_kwargs[index]
    device, dtype = model.placement.device, model.placement.stat_dtype
    num_heads, num_kv = shape.num_attention_heads, shape.num_key_value_heads
    qk, v = shape.qk_head_dim, shape.v_head_dim
    context_moment = BlockSecondMoment(num_heads, v, device, dtype)
    query_moment = BlockSecondMoment(num_heads, qk, device, dtype)
    key_moment = BlockSecondMoment(num_kv, qk, device, dtype)
    key_sum, key_abs = (Sum(num_kv, qk, device=device, dtype=dtype) for _ in range(2))
    query_abs = Sum(num_heads, qk, device=device, dtype=dtype)
    num_tokens = 0
    for part in hidden.slices():
        states = hidden.read(part)
        query, key, value = block.attention.project(block.attention_input(states), kwargs.get("position_embeddings"))
        context, _ = block.attention.attend(query, key, value, kwargs.get("attention_mask"))
        context_moment.update(context.flatten(0, 1))
        query_abs.update(query.abs().sum((0, 2)))
        key_abs.update(key.abs().sum((0, 2)))
        if not model.spec.rope:
            key_sum.update(key.sum((0, 2)))
            query_moment.update(query.transpose(1, 2).flatten(0, 1).flatten(1))
            key_moment.update(key.transpose(1, 2).flatten(0, 1).flatten(1))
        num_tokens += context.shape[0] * context.shape[1]
    stats = AttentionStats(
        context=context_moment.value,
        query=query_moment.value,
        key=key_moment.value,
        key_sum=key_sum.value,
        query_abs=query_abs.value,
        key_abs=key_abs.value,
        num_tokens=num_tokens,
    )
    if not torch.isfinite(stats.context).all() or not torch.isfinite(stats.query_abs).all():
        raise NumericalError("the attention activations contain NaN or infinite values.")
    return stats


def _context_moments(
    model: StreamedModel,
    block: DecoderBlock,
    index: int,
    streams: Streams,
    dense: PrunedAttention,
    target: str,
) -> ContextMoments:
    """Measure the context of the trial attention in `block` against its target, and advance the dense stream.

    The target is what the block should add to the pruned stream x: the dense block's output on x itself, or what
    leads from x to the dense model's stream, (h + dense output on h) - x. Biases cancel or are kept as they are, so
    both are taken without the output bias.
    """
    kwargs = model.layer_kwargs[index]
    device, dtype = model.placement.device, model.placement.stat_dtype
    context_moment = SecondMoment(block.out_projection.in_features, None, device, dtype)
    target_moment = SecondMoment(block.out_projection.in_features, model.config.hidden_size, device, dtype)
    energy = 0.0
    for part in streams.pruned.slices():
        states = streams.pruned.read(part)
        wanted = None
        if streams.dense is not None:
            dense_states = streams.dense.read(part)
            output = block.attention_output(dense, dense_states, kwargs)
            wanted = dense_states + output - states
            streams.dense.write(part, block.add_attention(dense_states, output))
        if wanted is None or target == "block":
            wanted = block.attention_output(dense, states, kwargs)
        wanted = _without_bias(wanted, block.out_projection).flatten(0, 1)  # the trial keeps the dense bias
        context = block.context(block.attention, block.attention_input(states), kwargs).flatten(0, 1)
        context_moment.update(context)
        target_moment.update(context, wanted)
        energy += float(wanted.float().square().sum(dtype=torch.float64))
    return ContextMoments(context=context_moment.value, target=target_moment.value, target_energy=energy)


def _ffn_moments(
    model: StreamedModel, block: DecoderBlock, index: int, streams: Streams, options: FFNOptions
) -> FFNMoments:
    """Advance the pruned stream through attention and the dense stream through the FFN; measure the dense FFN."""
    width, hidden_size = model.dense_shape.intermediate_size, model.config.hidden_size
    device, dtype = model.placement.device, model.placement.stat_dtype
    moment = SecondMoment(width, None, device, dtype)
    target_moment = SecondMoment(width, hidden_size, device, dtype)
    energy = 0.0
    for part in streams.pruned.slices():
        states = block.attention_step(streams.pruned.read(part), model.layer_kwargs[index])
        streams.pruned.write(part, states)
        act = block.act(block.ffn_input(states)).flatten(0, 1)
        moment.update(act)
        if streams.dense is not None:
            dense_states = streams.dense.read(part)
            output = block.ffn_output(dense_states)
            if options.target == "model":
                wanted = _without_bias(dense_states + output - states, block.down_projection).flatten(0, 1)
                target_moment.update(act, wanted)
                energy += float(wanted.float().square().sum(dtype=torch.float64))
            streams.dense.write(part, block.add_ffn(dense_states, output))
    value = moment.value
    if not torch.isfinite(value).all():
        raise NumericalError("the FFN activations contain NaN or infinite values.")
    if options.target == "block" or streams.dense is None:
        return block_target(value, read_ffn(block, block.attention.shape).down)
    return FFNMoments(act=value, target=target_moment.value, target_energy=energy)


def _without_bias(output_BTD: Tensor, linear: torch.nn.Linear) -> Tensor:
    return output_BTD if linear.bias is None else output_BTD - linear.bias


def _advance_ffn(block: DecoderBlock, hidden: HiddenStates) -> None:
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
    block: DecoderBlock,
    index: int,
    streams: Streams,
    moments: FFNMoments,
    shape: LayerShape,
    keep: int,
    iterate: bool,
    options: FFNOptions,
) -> float:
    weights = read_ffn(block, shape)
    channels = select_channels(moments.act, weights.down, keep)
    edit, error = solve_down(moments, weights.down, channels, options)
    if iterate and keep < shape.intermediate_size:
        replay = _Replay(block, streams, weights.down, options.target)
        edit, error = iterate_pca(replay, moments, edit, error, options)
    write_ffn(block, model.config, index, replace(shape, intermediate_size=keep), fuse_ffn(weights, edit))
    _round_to_saved(model, block.ffn)
    return error


class _Replay:
    """Replays the outputs of up and gate and the target, batch by batch; nothing is stored."""

    def __init__(self, block: DecoderBlock, streams: Streams, down_weight: Tensor, target: str) -> None:
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
                wanted = _without_bias(dense.read(part) - states, block.down_projection)
            else:
                act = self.activation(up) if gate is None else self.activation(gate) * up
                wanted = act @ self._down_weight.to(act).T
            yield up.flatten(0, 1), None if gate is None else gate.flatten(0, 1), wanted.flatten(0, 1)


def _round_to_saved(model: StreamedModel, module: torch.nn.Module) -> None:
    """Round weights to the dtype they are stored in, so that later layers, and a resumed run, see what is saved."""
    if model.placement.save_dtype != model.placement.compute_dtype:
        for parameter in module.parameters():
            parameter.copy_(parameter.to(model.placement.save_dtype))
