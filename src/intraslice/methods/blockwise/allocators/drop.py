"""Which attention and FFN blocks go as a whole: those whose loss costs less than what thinning would take instead."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from intraslice.layers.sites import ATTENTION, FFN, ModelSites, Site
from intraslice.methods.blockwise.allocators.base import split_sparsity
from intraslice.methods.blockwise.allocators.mask_gradient import MaskGradients, summed_rows
from intraslice.methods.blockwise.options import AllocationOptions


@dataclass(frozen=True)
class _Candidate:
    """A block that might go; `price` is its importance per weight over that of the last unit that thinning takes."""

    layer: int
    site: Site
    price: float


def choose_dropped(
    measured: MaskGradients, sites: ModelSites, sparsity: float, options: AllocationOptions
) -> tuple[tuple[int, str], ...]:
    """Return (layer, name) of the blocks that go, the cheapest first.

    A block is one more unit. Its importance is that of a mask on all of it, the sum over the sequences of the squared
    sum of its channels' gradients, and no less than the sum of what its units are worth: gradients of opposite signs
    cancel in the first, but not in a block that is really gone. Its price is this importance per weight, over that of
    the last unit that goes when every block is thinned only; below 1, taking the block costs less than thinning. As in
    `shapes.py`, the last units of attention and of FFNs are taken to be worth the same.

    One attention always stays, and an FFN at or after the last one: FFN channels are the small coin with which the
    budget is settled.

    Args:
        measured: by the gradient pass.
        sites: all sites of the dense model.
        sparsity: fraction of all of them to remove.
        options: settings; max_dropped_share and max_drop_price are the caps.
    """
    candidates = _candidates(measured, sites, sparsity, options)
    left = {kind: {layer for layer, _ in sites.of(kind)} for kind in (ATTENTION, FFN)}
    most = int(options.max_dropped_share * len(candidates) + 1e-9)
    budget = sparsity * sites.num_weights
    gone: list[tuple[int, str]] = []
    for candidate in sorted(candidates, key=lambda candidate: candidate.price):
        site = candidate.site
        if candidate.price >= options.max_drop_price or len(gone) == most:
            break
        rest = {**left, site.kind: left[site.kind] - {candidate.layer}}
        settled = rest[ATTENTION] and max(rest[FFN], default=-1) >= max(rest[ATTENTION])
        if site.num_weights <= budget and settled:
            gone.append((candidate.layer, site.name))
            left = rest
            budget -= site.num_weights
    return tuple(gone)


def _candidates(
    measured: MaskGradients, sites: ModelSites, sparsity: float, options: AllocationOptions
) -> list[_Candidate]:
    """Return all blocks with their prices."""
    attention, ffn = split_sparsity(sites, sparsity, options)
    candidates = []
    for kind, lost, rotate in ((ATTENTION, attention, options.pca_attention), (FFN, ffn, options.pca_ffn)):
        found = measured.of(sites, kind)
        importance = [worth.flatten() for worth in measured.importance(sites, kind, rotate, options)]
        units = torch.cat(importance).sort().values
        last = float(units[min(round(lost * len(units)), len(units) - 1)]) * len(units) / sum(sites.sizes(kind))
        for (layer, site), gradients, worth in zip(sites.of(kind), found, importance, strict=True):
            in_one = summed_rows(gradients.grad.double().sum(1)[:, None], options.gradient_group)
            whole = max(float(in_one.square().sum()), float(worth.sum()))
            candidates.append(_Candidate(layer, site, whole / site.num_weights / max(last, 1e-300)))
    return candidates
