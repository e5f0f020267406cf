"""What each site keeps of gates that were learned: DISP-LLM as an allocation rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from intraslice.layers.sites import ATTENTION, FFN, ModelSites
from intraslice.methods.blockwise.allocators.base import Allocation
from intraslice.methods.blockwise.allocators.mask_gradient import keep_ranked_together
from intraslice.methods.blockwise.options import AllocationOptions


def allocate_by_gates(
    measured: Sequence[Mapping[str, Tensor]], sites: ModelSites, sparsity: float, options: AllocationOptions
) -> Allocation:
    """Give each site the share of its weights whose gates are above one threshold, which meets the budget.

    Args:
        measured: for each layer, by the name of the site, the logits of its gates.
        sites: with what counts of their weights.
        sparsity: fraction of these to remove.
        options: settings.
    """
    logits = {kind: [measured[layer][site.name] for layer, site in sites.of(kind)] for kind in (ATTENTION, FFN)}
    return Allocation.of_kinds(sites, keep_ranked_together(logits, sites, sparsity, options.max_site_sparsity))
