"""What every allocation rule returns, and how the budget is split between attention and FFNs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from intraslice.algebra.selection import HeadPlan
from intraslice.errors import BudgetError
from intraslice.layers.sites import ATTENTION, FFN, ModelSites
from intraslice.methods.blockwise.options import AllocationOptions

SPREAD = 0.05
"""Part of a unit: `keep_fractions` adds a tiny correction to every site, which must not cost one more unit."""


@dataclass(frozen=True)
class Allocation:
    """What each site keeps.

    Attributes:
        keep: for each layer, by the name of the site, the fraction of its linear weights that stays, in [0, 1]; 0 for
            a block that goes as a whole.
        heads: exact shapes of the attention sites, where a runtime asks for them; the fractions are then theirs.
        rope_pairs: rotary pairs that all heads of all layers keep; None leaves the choice to each kv head.
        kept_importance: share of the importance of all channels that these shapes keep.
        free_importance: the share that free shapes would have kept.
        unit_scores: for each layer, by the name of the site, what its units are worth, where the scores are measured
            before the first layer changes.
    """

    keep: tuple[Mapping[str, float], ...]
    heads: tuple[HeadPlan, ...] | None = None
    rope_pairs: tuple[int, ...] | None = None
    kept_importance: float | None = None
    free_importance: float | None = None
    unit_scores: tuple[Mapping[str, Sequence[float]], ...] | None = None

    @classmethod
    def of_kinds(cls, sites: ModelSites, keep: Mapping[str, Sequence[float]], **more: Any) -> Allocation:
        """Return an allocation from the fractions of the sites of each kind."""
        return cls(sites.by_site(keep), **more)

    def fractions(self, name: str) -> tuple[float, ...]:
        """Return what the sites of this name keep, in the order of the layers."""
        return tuple(layer[name] for layer in self.keep if name in layer)

    def dropped(self, layer: int) -> tuple[str, ...]:
        """Return the names of the sites of a layer that go as a whole."""
        return tuple(name for name, kept in self.keep[layer].items() if kept == 0.0)

    def with_dropped(self, sites: ModelSites) -> Allocation:
        """Return the allocation of all sites, of one that leaves out those that go."""
        keep = tuple(
            {site.name: kept.get(site.name, 0.0) for site in layer}
            for kept, layer in zip(self.keep, sites.layers, strict=True)
        )
        if self.heads is None:
            return replace(self, keep=keep)
        planned, none = iter(self.heads), HeadPlan(num_key_value_heads=0, group=0, width=0)
        heads = tuple(next(planned) if keep[layer][site.name] else none for layer, site in sites.of(ATTENTION))
        return replace(self, keep=keep, heads=heads)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "keep": [dict(layer) for layer in self.keep]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Allocation:
        """Inverse of `to_dict`, also after a way through JSON."""
        heads, pairs = data["heads"], data["rope_pairs"]
        return cls(
            tuple(dict(layer) for layer in data["keep"]),
            None if heads is None else tuple(HeadPlan(**plan) for plan in heads),
            None if pairs is None else tuple(pairs),
            data["kept_importance"],
            data["free_importance"],
            None if data["unit_scores"] is None else tuple(data["unit_scores"]),
        )


@dataclass(frozen=True)
class Units:
    """The removable units of the sites, and the budget counted in them.

    Whole-head methods remove query heads; a kv head goes only with its last query head. Attention sites then count
    with the weights of their query heads alone, so that one head compares fairly with one FFN channel, and the same
    share everywhere removes the same fraction of heads in every layer. Where kv heads go with all their query heads,
    all weights count.

    Attributes:
        sites: the sites with what counts of their weights.
        sparsity: fraction of all that counts to remove, for the sparsity that was asked for.
        dense: the sites with all their weights.
        unit: what counts: "weights", "units" or "groups".
    """

    sites: ModelSites
    sparsity: float
    dense: ModelSites
    unit: str = "weights"

    def to_weight_fractions(self, allocation: Allocation) -> Allocation:
        """Return an allocation of units as fractions of the sites' weights.

        The number of query heads (or kv heads) that go is rounded down, as in the published codes; the FFN of the layer
        makes up for it.
        """
        if self.unit == "weights":
            return allocation
        layers = []
        for kept, counted, dense in zip(allocation.keep, self.sites.layers, self.dense.layers, strict=True):
            keep = dict(kept)
            for site, full in zip(counted, dense, strict=True):
                if site.kind != ATTENTION:
                    continue
                heads = site.units if self.unit == "units" else site.num_groups
                rounded = 1.0 - math.floor(heads * (1.0 - keep[site.name]) + SPREAD) / heads
                owed = (rounded - keep[site.name]) * site.num_weights
                share = full.unit_share if self.unit == "units" else 1.0
                keep[site.name] = 1.0 - share * (1.0 - rounded)
                for other in counted:
                    if other.kind == FFN:
                        keep[other.name] -= owed / other.num_weights
                        break
            layers.append(keep)
        return replace(allocation, keep=tuple(layers))


def count_units(sites: ModelSites, sparsity: float, options: AllocationOptions) -> Units:
    """Return the sites in what `options.budget_unit` counts.

    Args:
        sites: all sites of the dense model.
        sparsity: fraction of all linear weights to remove.
        options: settings.

    Raises:
        BudgetError: the sparsity cannot be reached under the cap.
    """
    counted = sites
    if options.budget_unit == "units":
        layers = tuple(
            tuple(replace(site, num_weights=site.units * site.unit_weights) for site in layer) for layer in sites.layers
        )
        counted = ModelSites(layers)
    of_units = sparsity * sites.num_weights / counted.num_weights
    cap = options.max_site_sparsity
    if of_units > cap:
        raise BudgetError(
            f"sparsity {sparsity:g} cannot be reached: a site may lose at most {cap:.0%} of its {options.budget_unit}; "
            "lower --sparsity or raise allocation.max_site_sparsity."
        )
    return Units(counted, of_units, sites, options.budget_unit)


def split_sparsity(sites: ModelSites, sparsity: float, options: AllocationOptions) -> tuple[float, float]:
    """Return (attention sparsity, FFN sparsity) whose weighted sum is the target.

    The FFNs lose lambda_b * sparsity of their weights (section 3.3), attention what is left to lose. Where that would
    pass the cap of one of them, or ask for less than nothing, the other one takes the rest.
    """
    total_attention, total_ffn = sum(sites.sizes(ATTENTION)), sum(sites.sizes(FFN))
    remove = sparsity * (total_attention + total_ffn)
    cap = options.max_site_sparsity
    ffn = min(options.ffn_share * sparsity, cap, remove / total_ffn)
    attention = min((remove - ffn * total_ffn) / total_attention, cap)
    return max(attention, 0.0), (remove - attention * total_attention) / total_ffn
