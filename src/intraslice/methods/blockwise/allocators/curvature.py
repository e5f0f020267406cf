"""One threshold for the costs of all heads and channels: LLM-Surgeon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from intraslice.layers.sites import ATTENTION, FFN, ModelSites
from intraslice.methods.blockwise.allocators.base import Allocation
from intraslice.methods.blockwise.allocators.mask_gradient import keep_ranked_together
from intraslice.methods.blockwise.options import AllocationOptions


def allocate_by_curvature(
    measured: Sequence[Mapping[str, Sequence[float]]], sites: ModelSites, sparsity: float, options: AllocationOptions
) -> Allocation:
    """Remove the heads and channels of all layers that cost the loss least for each weight that goes with them.

    Args:
        measured: for each layer, by the name of the site, what removing each of its units costs.
        sites: with what counts of their weights.
        sparsity: fraction of these to remove.
        options: settings.
    """
    per_weight = {
        kind: [
            torch.tensor(measured[layer][site.name], dtype=torch.float64) * site.units / site.num_weights
            for layer, site in sites.of(kind)
        ]
        for kind in (ATTENTION, FFN)
    }
    keep = keep_ranked_together(per_weight, sites, sparsity, options.max_site_sparsity)
    return Allocation.of_kinds(sites, keep, unit_scores=tuple(measured))
