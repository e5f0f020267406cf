"""Which attention and FFN blocks go as a whole: those whose loss costs less than what thinning would take instead.

Shapes: S calibration sequences, C channels of a tap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from intraslice.layers.sites import ATTENTION, FFN, ModelSites, Site
from intraslice.methods.blockwise.allocators.base import split_sparsity
from intraslice.methods.blockwise.allocators.mask_gradient import MaskGradients, channel_importance
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

    A block is one more unit: its importance is that of a mask on all of it, the sum over the sequences of the squared
    sum of its channels' gradients (signs count, so that what its channels do against each other is no importance). It
    goes where its importance per weight is below that of the last unit that goes when every block is thinned only. As
    in `shapes.py`, the last units of attention and of FFNs are taken to be worth the same.

    Args:
        measured: by the gradient pass.
        sites: all sites of the dense model.
        sparsity: fraction of all of them to remove.
        options: settings; max_dropped_share is the cap. One attention always stays, and an FFN at or after the last
            one: FFN channels are the small coin with which the budget is settled.
    """
    limits = _last_units(measured, sites, sparsity, options)
    candidates = [
        _Candidate(layer, site, _block_importance(gradients.grad) / site.num_weights / limits[kind])
        for kind in (ATTENTION, FFN)
        for (layer, site), gradients in zip(sites.of(kind), measured.of(sites, kind), strict=True)
    ]
    left = {kind: {layer for layer, _ in sites.of(kind)} for kind in (ATTENTION, FFN)}
    most = int(options.max_dropped_share * len(candidates) + 1e-9)
    budget = sparsity * sites.num_weights
    gone: list[tuple[int, str]] = []
    for candidate in sorted(candidates, key=lambda candidate: candidate.price):
        site = candidate.site
        if candidate.price >= 1.0 or len(gone) == most:
            break
        rest = {**left, site.kind: left[site.kind] - {candidate.layer}}
        settled = rest[ATTENTION] and max(rest[FFN], default=-1) >= max(rest[ATTENTION])
        if site.num_weights <= budget and settled:
            gone.append((candidate.layer, site.name))
            left = rest
            budget -= site.num_weights
    return tuple(gone)


def _block_importance(grad_SC: Tensor) -> float:
    return float(grad_SC.double().sum(1).square().sum())


def _last_units(
    measured: MaskGradients, sites: ModelSites, sparsity: float, options: AllocationOptions
) -> Mapping[str, float]:
    """Return, for each kind of site, the importance per weight of the last unit that goes when all are thinned."""
    attention, ffn = split_sparsity(sites, sparsity, options)
    limits = {}
    for kind, lost, rotate in ((ATTENTION, attention, options.pca_attention), (FFN, ffn, options.pca_ffn)):
        found = measured.of(sites, kind)
        importance = [channel_importance(site.grad, site.moment if rotate else None).flatten() for site in found]
        units = torch.cat(importance).sort().values
        last = units[min(round(lost * len(units)), len(units) - 1)]
        limits[kind] = max(float(last) * len(units) / sum(sites.sizes(kind)), 1e-300)
    return limits
