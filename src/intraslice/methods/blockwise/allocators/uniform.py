"""The same sparsity in every layer, or in all but the outer ones."""

from __future__ import annotations

import math

from intraslice.layers.sites import ATTENTION, FFN, ModelSites
from intraslice.methods.blockwise.allocators.base import Allocation, split_sparsity
from intraslice.methods.blockwise.allocators.profile import spread_loss
from intraslice.methods.blockwise.options import AllocationOptions


def allocate_uniform(measured: None, sites: ModelSites, sparsity: float, options: AllocationOptions) -> Allocation:
    """Give each attention site and each FFN site the same sparsity; nothing is measured."""
    attention, ffn = split_sparsity(sites, sparsity, options)
    keep = {ATTENTION: [1.0 - attention] * len(sites.of(ATTENTION)), FFN: [1.0 - ffn] * len(sites.of(FFN))}
    return Allocation.of_kinds(sites, keep)


def allocate_inner(measured: None, sites: ModelSites, sparsity: float, options: AllocationOptions) -> Allocation:
    """Take the same share of every layer but the first and the last ones: LLM-Pruner prunes layers 4 to 29 of 32.

    The outer layers lose only what the others cannot under the cap.
    """
    total = len(sites.layers)
    # Rounded up, so that small models have outer layers too.
    first, last = (math.ceil(share * total - 1e-9) for share in (options.kept_first, options.kept_last))
    keep = {}
    for kind, mean in zip((ATTENTION, FFN), split_sparsity(sites, sparsity, options), strict=True):
        layers = [layer for layer, _ in sites.of(kind)]
        kept = {place for place, layer in enumerate(layers) if not first <= layer < total - last}
        lost = spread_loss([1.0] * len(layers), mean, options.max_site_sparsity, kept)
        keep[kind] = [1.0 - value for value in lost]
    return Allocation.of_kinds(sites, keep)
