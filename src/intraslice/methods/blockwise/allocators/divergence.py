"""Allocation by what the loss of each site was measured to cost: one currency for attention and FFNs.

Shapes: n measured losses of a site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from intraslice.layers.sites import ModelSites
from intraslice.methods.blockwise.allocators.base import Allocation
from intraslice.methods.blockwise.options import AllocationOptions

_STEPS = 200
"""Into how many equal parts the loss of a site is cut. What is left of the budget is a part of one step."""

_POWERS = (1.0, 4.0)
"""Least and largest power of the loss that a cost grows with outside of what was measured."""


@dataclass(frozen=True)
class SiteDivergences:
    """What the dense model's predictions lose when one site is pruned and everything else is dense.

    Attributes:
        layers: for each layer, by the name of the site, pairs of the fraction of its linear weights that it lost, in
            (0, 1], and the mean KL divergence from the dense model in nats per token; losses ascend.
    """

    layers: tuple[Mapping[str, tuple[tuple[float, float], ...]], ...]


def allocate_by_divergence(
    measured: SiteDivergences, sites: ModelSites, sparsity: float, options: AllocationOptions
) -> Allocation:
    """Minimise the sum of the sites' costs within the budget: sum_b C_b(s_b), with sum_b n_b s_b = s sum_b n_b.

    C_b is the convex hull of the measured costs of site b, n_b its weights. All sites lose until the next weight costs
    the same everywhere, so that no share of attention and FFNs has to be chosen.

    Args:
        measured: cost of some losses of every site.
        sites: what counts of the weights of each site.
        sparsity: fraction of all of them to remove.
        options: settings; max_site_sparsity caps what a site may lose.
    """
    all_sites = sites.every()
    steps: list[tuple[float, int, float]] = []  # cost of a weight, number of the site, part of it that goes
    for number, (layer, site) in enumerate(all_sites):
        points = measured.layers[layer].get(site.name)
        if not points:
            # So small that it has no width between none and all.
            continue
        # Beyond what was measured costs grow faster than the curve says.
        most = min(options.max_site_sparsity, points[-1][0])
        losses = [most * step / _STEPS for step in range(_STEPS + 1)]
        curve = cost_curve(points, losses)
        for start, stop in zip(*(hull := _lower_hull(losses, curve), hull[1:]), strict=False):
            part = losses[stop] - losses[start]
            steps.append(((curve[stop] - curve[start]) / (part * site.num_weights), number, part))
    left = sparsity * sites.num_weights
    keep = [1.0] * len(all_sites)
    for _, number, part in sorted(steps):
        weights = all_sites[number][1].num_weights
        taken = min(part, left / weights)
        keep[number] -= taken
        left -= taken * weights
        if left <= 0:
            break
    # What the measured losses do not reach, all sites lose alike.
    while left > 1e-6:
        free = [n for n, kept in enumerate(keep) if kept > 1.0 - options.max_site_sparsity + 1e-12]
        share = left / sum(all_sites[number][1].num_weights for number in free)
        for number in free:
            taken = min(share, keep[number] - (1.0 - options.max_site_sparsity))
            keep[number] -= taken
            left -= taken * all_sites[number][1].num_weights
    layers: list[dict[str, float]] = [{} for _ in sites.layers]
    for (layer, site), kept in zip(all_sites, keep, strict=True):
        layers[layer][site.name] = kept
    return Allocation(tuple(layers))


def cost_curve(measured: Sequence[tuple[float, float]], losses: Sequence[float]) -> list[float]:
    """Return the cost of each loss: between measured points, and beyond them, a power of the loss.

    Args:
        measured: pairs of loss and cost, losses ascending; a cost below an earlier one is noise and is raised to it.
        losses: fractions of a site.
    """
    points: list[tuple[float, float]] = []
    for loss, cost in measured:
        cost = max(cost, 1e-12, points[-1][1] if points else 0.0)
        if not points or loss > points[-1][0]:
            points.append((loss, cost))
    logs = [(math.log(loss), math.log(cost)) for loss, cost in points]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(logs, logs[1:], strict=False)] or [2.0]
    first, last = (min(max(slope, _POWERS[0]), _POWERS[1]) for slope in (slopes[0], slopes[-1]))

    def cost_of(loss: float) -> float:
        if loss == 0.0:
            return 0.0
        at = math.log(loss)
        if at <= logs[0][0]:
            return math.exp(logs[0][1] + first * (at - logs[0][0]))
        for (start, low), slope, (stop, _) in zip(logs, slopes, logs[1:], strict=False):
            if at <= stop:
                return math.exp(low + slope * (at - start))
        return math.exp(logs[-1][1] + last * (at - logs[-1][0]))

    return [cost_of(loss) for loss in losses]


def _lower_hull(xs: Sequence[float], ys: Sequence[float]) -> list[int]:
    """Return the indices of the points on the lower convex hull, xs ascending."""
    hull: list[int] = []
    for index in range(len(xs)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (ys[b] - ys[a]) * (xs[index] - xs[a]) < (ys[index] - ys[a]) * (xs[b] - xs[a]):
                break
            hull.pop()
        hull.append(index)
    return hull
