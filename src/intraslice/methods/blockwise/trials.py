"""One site of a layer pruned by itself, at several losses: what passes measure that compare losses."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

from intraslice.layers.decoder import DecoderLayer, read_ffn
from intraslice.layers.sites import ATTENTION, Site
from intraslice.methods.blockwise.budget import ffn_widths
from intraslice.methods.blockwise.layer import (
    LayerPlan,
    prune_attention,
    solve_ffn,
    stats_of_attention,
    write_solved_ffn,
)
from intraslice.methods.blockwise.measure import ffn_moments
from intraslice.methods.blockwise.options import BlockwiseOptions
from intraslice.streaming.hidden import HiddenStates, Streams
from intraslice.streaming.model import StreamedModel


def for_trials(options: BlockwiseOptions) -> BlockwiseOptions:
    """Return options with which sites are solved for their own output: how far a stream drifts is not known yet."""
    return replace(
        options,
        attention=replace(options.attention, repair_against="own_output", measured_on="pruned_stream"),
        ffn=replace(options.ffn, repair_against="own_output", measured_on="pruned_stream"),
    )


def prune_alone(
    model: StreamedModel,
    layer: DecoderLayer,
    index: int,
    site: Site,
    losses: Sequence[float],
    fit: HiddenStates,
    options: BlockwiseOptions,
) -> Iterator[DecoderLayer]:
    """Yield a copy of a layer for each loss, in which one site has come as near to it as its widths allow.

    Args:
        model: the streamed model.
        layer: the site is dense in it; it stays as it is.
        index: number of the layer.
        site: what is pruned.
        losses: shares of the weights of the site.
        fit: what the layer reads; it stays as it is.
        options: `for_trials`.

    Raises:
        NumericalError: activations are NaN or infinite, or a system cannot be solved.
    """
    if site.kind == ATTENTION:
        stats = stats_of_attention(model, layer, fit, options.attention)
        for loss in losses:
            trial = copy.deepcopy(layer)
            if loss > 0.0:
                streams, plan = Streams(pruned=fit, dense=None), LayerPlan(iter_pca=False)
                budget = (1.0 - loss) * site.num_weights
                prune_attention(model, trial, index, streams, budget, plan, options.attention, stats)
            yield trial
        return
    # Measuring advances the stream through attention.
    moments = ffn_moments(model, layer, Streams(pruned=fit.clone(), dense=None), layer.attention, options.ffn)
    weights, widths = read_ffn(layer, layer.shape), ffn_widths(site, options.ffn.ffn_multiple)
    for loss in losses:
        trial = copy.deepcopy(layer)
        keep = min(widths, key=lambda width: abs(width - (1.0 - loss) * site.units))
        if keep < site.units:
            edit, _ = solve_ffn(trial, weights, moments, keep, options.ffn)
            write_solved_ffn(model, trial, index, weights, edit)
        yield trial
