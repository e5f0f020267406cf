"""Hands the budget out: what one site leaves over, a later one takes.

Widths are rounded and heads are whole, so no site meets its share exactly. What attention leaves over (or overdraws)
goes to the FFN of the same layer, and what the FFN leaves over goes to the next layer. FFN channels are the small coin.
So that the last layers can always take what is left, no FFN leaves more, or less, than the later ones can absorb; and
what no choice of widths can reach is refused before the first layer changes.

All numbers are linear weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from intraslice.algebra.selection import TOLERANCE
from intraslice.errors import BudgetError
from intraslice.layers.sites import ATTENTION, ModelSites, Site
from intraslice.methods.blockwise.allocators.base import Allocation
from intraslice.methods.blockwise.options import BlockwiseOptions
from intraslice.methods.choices import option_values

_COARSEST = 0.02
"""Steps between possible widths may miss the sparsity by at most this, on a model of very few channels."""


@dataclass(frozen=True)
class _Range:
    """What a site may come to weigh, whatever the calibration text says."""

    low: float
    planned: float
    high: float
    slack: float = 0.0


class Budget:
    """Where the budget of a run goes.

    Args:
        sites: all sites of the dense model.
        allocation: what each keeps.
        options: of the method; they say which widths there are.
        carry: what the finished layers left over.
    """

    def __init__(
        self, sites: ModelSites, allocation: Allocation, options: BlockwiseOptions, carry: float = 0.0
    ) -> None:
        self._sites = sites
        self._keep = allocation.keep
        self._options = options
        self._planned_heads = allocation.heads is not None
        self.carry = carry

    def planned(self, layer: int, site: Site) -> float:
        """Return the weights that the allocation gives a site."""
        return self._keep[layer][site.name] * site.num_weights

    def widths(self, site: Site) -> list[int]:
        """Return the numbers of channels that an FFN site may keep, ascending."""
        return ffn_widths(site, self._options.ffn.ffn_multiple)

    def channels(self, layer: int, site: Site, wanted: float) -> int:
        """Return how many channels an FFN site keeps.

        Args:
            layer: its layer.
            site: the site.
            wanted: what it may weigh, with what the sites before have left over.
        """
        low, high = self._window(layer, site, wanted)
        widths = self.widths(site)
        # Half a step is what rounding may miss in any case: no site that stays whole is cut for less.
        half = self._options.ffn.ffn_multiple * site.unit_weights / 2
        low, high = low - half, high + half
        possible = [width for width in widths if low <= width * site.unit_weights <= high]
        if possible:
            return min(possible, key=lambda width: abs(width - wanted / site.unit_weights))
        nearest = min(max(wanted, low), high)
        return min(widths, key=lambda width: abs(width - nearest / site.unit_weights))

    def _window(self, layer: int, site: Site, wanted: float) -> tuple[float, float]:
        """Return the weights of a site with which the later sites can still meet the budget."""
        names = [each.name for each in self._sites.layers[layer]]
        later = [
            self._range(number, each)
            for number, sites in enumerate(self._sites.layers[layer:], start=layer)
            for each in sites
            if number > layer or names.index(each.name) > names.index(site.name)
        ]
        # How many heads a later layer keeps is known up to one head per layer when it is measured.
        heads = sum(each.slack for each in later)
        low = wanted + sum(each.planned - each.high for each in later) + heads
        high = wanted + sum(each.planned - each.low for each in later) - heads
        return (low, high) if low <= high else (wanted, wanted)

    def _range(self, layer: int, site: Site) -> _Range:
        planned = self.planned(layer, site)
        if planned == 0.0:
            return _Range(0.0, 0.0, 0.0)
        if site.kind == ATTENTION:
            kept = self._keep[layer][site.name]
            exact = self._planned_heads or kept >= 1.0
            return _Range(planned, planned, planned, 0.0 if exact else site.unit_weights + self._overspent(site, kept))
        widths = self.widths(site)
        return _Range(widths[0] * site.unit_weights, planned, widths[-1] * site.unit_weights)

    def _overspent(self, site: Site, kept: float) -> float:
        """Return the most that attention weighs more than planned where the share counts query dimensions alone.

        With all kv heads and as few query heads as full width allows, kept * H of them, the kv heads stay whole.
        """
        attention = self._options.attention
        if attention.head_budget == "weights" or "attention.head_budget" not in self._options.read():
            return 0.0
        return (1.0 - kept) * site.num_weights * (1.0 - site.unit_share)

    def check(self, sparsity: float) -> None:
        """Refuse a sparsity that the possible widths do not reach.

        Raises:
            BudgetError: before any layer is changed; says what can be reached.
        """
        kept, carry, steps = 0.0, 0.0, []
        for layer, sites in enumerate(self._sites.layers):
            for site in sites:
                planned = self.planned(layer, site)
                spent = planned
                if site.kind != ATTENTION and planned > 0.0:
                    spent = float(self.channels(layer, site, planned + carry) * site.unit_weights)
                    steps.append(self._options.ffn.ffn_multiple * site.unit_weights)
                carry += planned - spent
                kept += spent
        total = self._sites.num_weights
        reached = 1.0 - kept / total
        if abs(reached - sparsity) > allowed_miss(steps, total):
            read, values = self._options.read(), option_values(self._options)
            multiples = [name for name in ("attention.head_multiple", "ffn.ffn_multiple") if name in read]
            given = " and ".join(f"{name} = {values[name]}" for name in multiples)
            raise BudgetError(
                f"sparsity {sparsity:g} was asked for, but with {given} the possible widths reach only {reached:.4f}; "
                f"lower {'it' if len(multiples) == 1 else 'them'} or change the sparsity."
            )


def ffn_widths(site: Site, multiple: int) -> list[int]:
    """Return the numbers of channels that an FFN site may keep, ascending: multiples, and all of them."""
    return [*range(multiple, site.units, multiple), site.units]


def allowed_miss(steps: Sequence[float], total: float) -> float:
    """Return how far the sparsity that is reached may be from the one that was asked for.

    Half a step of the smallest FFN cannot be avoided; on models of millions of weights it is nothing.

    Args:
        steps: weights between two possible widths of the FFN sites.
        total: weights of all sites.
    """
    return max(TOLERANCE, min(_COARSEST, min(steps, default=0.0) / 2 / total))
