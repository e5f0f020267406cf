"""The same sparsity in every layer."""

from __future__ import annotations

from intraslice.layers.sites import ATTENTION, FFN, ModelSites
from intraslice.methods.blockwise.allocators.base import Allocation, split_sparsity
from intraslice.methods.blockwise.options import AllocationOptions


def allocate_uniform(measured: None, sites: ModelSites, sparsity: float, options: AllocationOptions) -> Allocation:
    """Give each attention site and each FFN site the same sparsity; nothing is measured."""
    attention, ffn = split_sparsity(sites, sparsity, options)
    keep = {ATTENTION: [1.0 - attention] * len(sites.of(ATTENTION)), FFN: [1.0 - ffn] * len(sites.of(FFN))}
    return Allocation.of_kinds(sites, keep)
