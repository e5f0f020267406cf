"""Prunes one decoder layer, site by site: measure, choose, measure again, solve, write, propagate.

Shapes: B sequences of a batch, T tokens, N = B * T, D hidden_size, H query heads, K kv heads, d head_dim,
F intermediate_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from intraslice.algebra.selection import HeadPlan
from intraslice.errors import NumericalError
from intraslice.layers.decoder import DecoderLayer, read_attention, read_ffn
from intraslice.layers.sites import ATTENTION, FFN, Site
from intraslice.layers.surgery import drop_block, write_attention, write_ffn
from intraslice.layers.weights import FFNEdit, FFNWeights, ValueEdit, attention_shape, fuse_ffn, fuse_qk, fuse_value
from intraslice.methods.blockwise.budget import Budget
from intraslice.methods.blockwise.channels import select_channels, solve_down
from intraslice.methods.blockwise.distill import Distilled, distill_site
from intraslice.methods.blockwise.heads import AttentionStats, choose_qk, solve_value
from intraslice.methods.blockwise.iter_pca import iterate_pca
from intraslice.methods.blockwise.measure import (
    OutputAim,
    aimed_between,
    attention_stats,
    context_moments,
    ffn_moments,
    share_in_target,
    with_gain,
)
from intraslice.methods.blockwise.options import AttentionOptions, BlockwiseOptions, FFNOptions
from intraslice.methods.blockwise.repairs import OutputMoments
from intraslice.methods.blockwise.strategies import BASES, SCORES
from intraslice.runtime.families_intraslice import LayerShape
from intraslice.runtime.modeling_intraslice import PrunedAttention
from intraslice.streaming.hidden import HiddenStates, Streams
from intraslice.streaming.model import StreamedModel
from intraslice.streaming.propagate import propagate_ffn

_Edit = TypeVar("_Edit", ValueEdit, FFNEdit)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What is decided of a layer before it is measured.

    Attributes:
        iter_pca: whether Eq. 7 is applied to its FFN.
        heads: exact shape of its attention; None leaves it to the budget.
        rope_pairs: pairs that all heads of the model keep; None leaves them to each kv head.
        dropped: names of the sites that go as a whole.
        unit_scores: by the name of the site, scores that were measured before the first layer changed.
    """

    iter_pca: bool
    heads: HeadPlan | None = None
    rope_pairs: tuple[int, ...] | None = None
    dropped: tuple[str, ...] = ()
    unit_scores: Mapping[str, Sequence[float]] | None = None

    def measured(self, site: str) -> Tensor | None:
        """Return the measured scores of a site, [units], float64; None where there are none."""
        scores = (self.unit_scores or {}).get(site)
        return None if scores is None else torch.tensor(scores, dtype=torch.float64)


@dataclass(frozen=True)
class PrunedLayer:
    """What pruning a layer produced.

    Attributes:
        shape: its new shape.
        heads: kept query heads.
        errors: relative squared error of each site, by its name.
        distilled: what training has made of the sites that were trained.
    """

    shape: LayerShape
    heads: tuple[int, ...]
    errors: dict[str, float]
    distilled: dict[str, Distilled]


@torch.no_grad()
def prune_layer(
    model: StreamedModel,
    layer: DecoderLayer,
    index: int,
    streams: Streams,
    budget: Budget,
    plan: LayerPlan,
    options: BlockwiseOptions,
) -> PrunedLayer:
    """Prune a layer in place, and advance the streams through it.

    Args:
        model: the streamed model the layer belongs to.
        layer: at its dense shape.
        index: number of the layer.
        streams: inputs of the layer; overwritten by its outputs.
        budget: where the weights that may stay are taken from.
        plan: of this layer.
        options: of the method.

    Raises:
        NumericalError: activations are NaN or infinite, or a system cannot be solved.
    """
    errors: dict[str, float] = {}
    distilled: dict[str, Distilled] = {}
    heads: tuple[int, ...] = ()
    granted, spent = 0.0, 0
    dense = layer.attention
    try:
        for site in model.sites.layers[index]:
            planned = budget.planned(index, site)
            if site.name in plan.dropped:
                _drop_site(model, layer, index, site, streams, dense)
                # Nothing of what the site was to add is there any more; what follows is repaired for it.
                errors[site.name] = 1.0
                if site.kind != ATTENTION:
                    budget.carry += granted - spent
                    granted, spent = 0.0, 0
                continue
            if site.kind == ATTENTION:
                pruned = prune_attention(model, layer, index, streams, planned, plan, options.attention)
                heads, errors[site.name] = pruned.heads, pruned.error
                granted, spent = granted + planned, spent + attention_cost(model, pruned.shape)
                if options.distills(site.kind):
                    distilled[site.name] = _distill(model, layer, index, site, streams, options)
                continue
            # An FFN gets what was left over before it as well, and leaves the rest to the next one.
            available = planned + budget.carry + granted
            keep, error = _prune_ffn(
                model, layer, index, site, streams, dense, budget, available - spent, plan, options.ffn
            )
            errors[site.name] = error
            budget.carry = available - (spent + keep * site.unit_weights)
            granted, spent = 0.0, 0
            if options.distills(site.kind):
                distilled[site.name] = _distill(model, layer, index, site, streams, options)
        propagate_ffn(layer, streams.pruned)
    except NumericalError as error:
        raise NumericalError(f"layer {index}: {error}") from error
    return PrunedLayer(layer.shape, heads, errors, distilled)


def _distill(
    model: StreamedModel, layer: DecoderLayer, index: int, site: Site, streams: Streams, options: BlockwiseOptions
) -> Distilled:
    of_site = options.attention if site.kind == ATTENTION else options.ffn
    found = distill_site(model, layer, index, site, streams, of_site, options.distill)
    _round_to_saved(model, layer.attention if site.kind == ATTENTION else layer.ffn)
    return found


def _drop_site(
    model: StreamedModel, layer: DecoderLayer, index: int, site: Site, streams: Streams, attention: PrunedAttention
) -> None:
    """Take a whole site out of the layer, and advance the streams as far as measuring it would have done."""
    dense, pruned = streams.dense, streams.pruned
    for part in pruned.slices():
        if site.kind == ATTENTION:
            if dense is not None:
                dense.write(part, layer.attention_step(dense.read(part)))
            continue
        pruned.write(part, layer.attention_step(pruned.read(part)))
        if dense is not None:
            states = dense.read(part)
            dense.write(part, layer.add_ffn(layer.ffn_residual(states, attention), layer.ffn_output(states)))
    drop_block(layer, model.config, index, site.kind)


@dataclass(frozen=True)
class AttentionOutcome:
    """What pruning an attention site produced: its shape, the kept query heads, and the relative squared error."""

    shape: LayerShape
    heads: tuple[int, ...]
    error: float


def prune_attention(
    model: StreamedModel,
    layer: DecoderLayer,
    index: int,
    streams: Streams,
    budget: float,
    plan: LayerPlan,
    options: AttentionOptions,
    stats: AttentionStats | None = None,
) -> AttentionOutcome:
    """Prune the attention of a layer in place, and advance the dense stream through it.

    Args:
        model: the streamed model the layer belongs to.
        layer: its attention is dense.
        index: number of the layer.
        streams: inputs of the layer.
        budget: linear weights that may stay.
        plan: of this layer.
        options: of attention.
        stats: what `attention_stats` gives for this layer and these streams, where it was measured before.
    """
    dense, whole_shape = layer.attention, model.dense_shapes[index]
    gain = layer.output_gain(ATTENTION)
    weights = read_attention(layer, whole_shape)
    measured = streams.pruned
    if options.measured_on == "dense_stream":
        assert streams.dense is not None
        measured = streams.dense
    if stats is None:
        stats = stats_of_attention(model, layer, measured, options)
    pairs = model.pairs_to_channels(index)
    # The factors behind o count where something is chosen or solved; what is written leaves them out, because the trial
    # shares with the dense attention whatever keeps its size.
    edit = choose_qk(
        replace(weights, o=with_gain(weights.o, gain)),
        stats,
        budget,
        options,
        pairs,
        plan.heads,
        plan.rope_pairs,
        plan.measured(ATTENTION),
    )
    trial, per_kv = fuse_qk(weights, edit, pairs, model.spec.interleaved)
    ffn_width = whole_shape.intermediate_size
    # Where all heads share a norm's weight, they may need their own once they are narrower.
    headed = edit.query_norm is not None and stats.norms is not None and stats.norms.over == "head"
    headed = headed and plan.rope_pairs is None
    trial_shape = attention_shape(per_kv, trial, ffn_width, headed_qk_norm=headed)
    write_attention(layer, model.config, index, trial_shape, trial, edit.rope_pairs)
    moments = context_moments(model, layer, streams, dense, options)
    dense_dims = whole_shape.num_attention_heads * whole_shape.qk_head_dim
    whole = len(edit.heads) * edit.width == dense_dims
    value_edit, error = solve_value(
        with_gain(trial.o, gain),
        per_kv,
        edit.width,
        moments,
        options,
        v_channels=edit.v_channels,
        v_maps=edit.v_maps,
        whole=whole,
    )
    fused = fuse_value(trial, _without_gain(value_edit, gain))
    output_bias = value_edit.o_bias is not None
    shape = attention_shape(per_kv, fused, ffn_width, output_bias=output_bias, headed_qk_norm=headed)
    write_attention(layer, model.config, index, shape, fused, edit.rope_pairs)
    _round_to_saved(model, layer.attention)
    return AttentionOutcome(shape, edit.heads, error)


def stats_of_attention(
    model: StreamedModel, layer: DecoderLayer, hidden: HiddenStates, options: AttentionOptions
) -> AttentionStats:
    """Measure what the choice of heads and directions reads."""
    needs = (SCORES[options.score].needs_full_moment, BASES[options.basis].needs_values)
    return attention_stats(model, layer, hidden, *needs)


def attention_cost(model: StreamedModel, shape: LayerShape) -> int:
    """Return the linear weights of the attention of a layer of this shape."""
    return model.spec.num_parameters(replace(shape, intermediate_size=0), model.config.hidden_size)


def _prune_ffn(
    model: StreamedModel,
    layer: DecoderLayer,
    index: int,
    site: Site,
    streams: Streams,
    dense: PrunedAttention,
    budget: Budget,
    wanted: float,
    plan: LayerPlan,
    options: FFNOptions,
) -> tuple[int, float]:
    """Return the kept channels and the error."""
    moments = ffn_moments(model, layer, streams, dense, options)
    keep = budget.channels(index, site, wanted)
    weights = read_ffn(layer, layer.shape)
    edit, error = solve_ffn(layer, weights, moments, keep, options, plan.measured(site.name))
    if plan.iter_pca and keep < layer.shape.intermediate_size:
        replay = _Replay(layer, streams, with_gain(weights.down, layer.output_gain(FFN)), options)
        edit, error = iterate_pca(replay, moments, edit, error, options)
    write_solved_ffn(model, layer, index, weights, edit)
    return keep, error


def solve_ffn(
    layer: DecoderLayer,
    weights: FFNWeights,
    moments: OutputMoments,
    keep: int,
    options: FFNOptions,
    scores_F: Tensor | None = None,
) -> tuple[FFNEdit, float]:
    """Choose channels of an FFN and solve its output projection; return the edit and its relative squared error.

    Args:
        layer: its FFN is dense.
        weights: of its FFN.
        moments: sums over the site.
        keep: how many channels stay.
        options: of FFNs.
        scores_F: scores that were measured before the first layer changed, [F].
    """
    down = with_gain(weights.down, layer.output_gain(FFN))
    reading = [matrix for matrix in (weights.up, weights.gate) if matrix is not None]
    channels = select_channels(moments, down, keep, options, reading, scores_F)
    return solve_down(moments, down, channels, options)


def write_solved_ffn(model: StreamedModel, layer: DecoderLayer, index: int, weights: FFNWeights, edit: FFNEdit) -> None:
    """Write what was solved with the factors behind the output projection into a layer whose FFN is dense."""
    shape, gain = layer.shape, layer.output_gain(FFN)
    bias = shape.output_bias or edit.down_bias is not None
    shape = replace(shape, intermediate_size=edit.down_weight.shape[1], output_bias=bias)
    write_ffn(layer, model.config, index, shape, fuse_ffn(weights, _without_gain(edit, gain)))
    _round_to_saved(model, layer.ffn)


def _without_gain(edit: _Edit, gain: Tensor | None) -> _Edit:
    """Return an edit whose output projection leaves out the factors that come after it."""
    if gain is None:
        return edit
    # A channel that the norm switches off may have any weight.
    factor = torch.where(gain == 0, 0.0, 1.0 / gain)
    if isinstance(edit, ValueEdit):
        bias = None if edit.o_bias is None else edit.o_bias * factor
        return replace(edit, o_weight=edit.o_weight * factor[:, None], o_bias=bias)
    bias = None if edit.down_bias is None else edit.down_bias * factor
    return replace(edit, down_weight=edit.down_weight * factor[:, None], down_bias=bias)


class _Replay:
    """Replays the outputs of up and gate and the target, batch by batch; nothing is stored."""

    def __init__(self, layer: DecoderLayer, streams: Streams, down_weight: Tensor, options: FFNOptions) -> None:
        self._layer = layer
        self._streams = streams
        self._options = options
        self._down_weight = down_weight
        self._aim = OutputAim(layer, FFN)
        self.activation = layer.activation

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        layer, dense = self._layer, self._streams.dense
        for part in self._streams.pruned.slices():
            states = self._streams.pruned.read(part)
            up, gate = layer.preactivations(layer.ffn_input(states))
            act = self.activation(up) if gate is None else self.activation(gate) * up
            if self._options.repair_against == "dense_stream" and dense is not None:
                # `ffn_moments` has already advanced the dense stream past this layer.
                missing = dense.read(part) - layer.ffn_residual(states)
                if (share := self._aim.drift_share(share_in_target(self._options))) is not None:
                    missing = aimed_between(layer.added(FFN, layer.down_projection(act)), missing, share)
                target, _ = self._aim.to_stream(missing, None)
            else:
                target = act @ self._down_weight.to(act).T
            yield up.flatten(0, 1), None if gate is None else gate.flatten(0, 1), target.flatten(0, 1)


def _round_to_saved(model: StreamedModel, module: torch.nn.Module) -> None:
    """Round weights to the dtype they are stored in, so that later layers, and a resumed run, see what is saved."""
    if model.placement.save_dtype != model.placement.compute_dtype:
        for parameter in module.parameters():
            parameter.copy_(parameter.to(model.placement.save_dtype))
