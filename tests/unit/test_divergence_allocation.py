"""Allocation by measured divergences: against every allocation on a grid, and what lies between measured points."""

from __future__ import annotations

import itertools

import pytest

from intraslice.methods.blockwise.allocators.divergence import SiteDivergences, allocate_by_divergence, cost_curve
from intraslice.methods.blockwise.options import AllocationOptions
from support.model_sites import kept_share, sites

MODEL = sites([400, 400], [1200, 1200])
MEASURED = SiteDivergences(
    (
        {"attention": ((0.2, 0.02), (0.5, 0.15), (0.9, 0.5)), "ffn": ((0.2, 0.01), (0.5, 0.08), (0.9, 0.4))},
        {"attention": ((0.2, 0.004), (0.5, 0.03), (0.9, 0.2)), "ffn": ((0.2, 0.05), (0.5, 0.3), (0.9, 2.0))},
    )
)
OPTIONS = AllocationOptions(rule="divergence")


def total_cost(lost) -> float:
    """Return the sum of the costs of what attention and FFN of both layers lose, in this order."""
    points = (layer[name] for layer in MEASURED.layers for name in ("attention", "ffn"))
    return sum(cost_curve(each, [loss])[0] for each, loss in zip(points, lost, strict=True))


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.6])
def test_no_allocation_costs_less(sparsity: float) -> None:
    allocation = allocate_by_divergence(MEASURED, MODEL, sparsity, OPTIONS)
    assert kept_share(MODEL, allocation.keep) == pytest.approx(1 - sparsity, abs=1e-9)
    found = [1 - layer[name] for layer in allocation.keep for name in ("attention", "ffn")]
    assert all(-1e-9 <= loss <= 0.9 + 1e-9 for loss in found)
    grid = [step / 30 for step in range(28)]
    weights = (400, 1200, 400, 1200)
    best = float("inf")
    for lost in itertools.product(grid, repeat=3):
        rest = (sparsity * sum(weights) - sum(w * x for w, x in zip(weights, lost, strict=False))) / weights[3]
        if 0 <= rest <= 0.9:
            best = min(best, total_cost((*lost, rest)))
    # The hull has corners every 0.45 % of a site, the grid every 3 %.
    assert total_cost(found) <= best * (1 + 1e-3)


@pytest.mark.parametrize(("cap", "kept"), [(0.9, 0.5), (0.4, 0.6)])
def test_a_site_that_costs_nothing_goes_as_far_as_it_was_measured_or_the_cap(cap: float, kept: float) -> None:
    free = SiteDivergences(({**MEASURED.layers[0], "attention": ((0.2, 0.0), (0.5, 0.0))}, MEASURED.layers[1]))
    allocation = allocate_by_divergence(free, MODEL, 0.3, AllocationOptions(rule="divergence", max_site_sparsity=cap))
    assert allocation.keep[0]["attention"] == pytest.approx(kept)


def test_the_budget_is_met_where_not_enough_was_measured() -> None:
    little = SiteDivergences(({"attention": ((0.2, 0.02),), "ffn": ((0.2, 0.01),)}, {"ffn": ((0.3, 0.2),)}))
    allocation = allocate_by_divergence(little, MODEL, 0.6, OPTIONS)
    assert kept_share(MODEL, allocation.keep) == pytest.approx(0.4, abs=1e-9)


def test_a_curve_goes_through_its_points_and_grows() -> None:
    points = ((0.2, 0.01), (0.4, 0.04), (0.8, 0.02))
    losses = [0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9]
    curve = cost_curve(points, losses)
    assert curve[0] == 0.0
    assert curve[2:4] == pytest.approx([0.01, 0.04])
    # The square law of the first two points holds before them; less than before is noise.
    assert curve[1] == pytest.approx(0.0025)
    assert curve[4:6] == pytest.approx([0.04, 0.04])
    assert curve == sorted(curve)


def test_one_point_is_enough() -> None:
    assert cost_curve(((0.3, 0.09),), [0.1, 0.6]) == pytest.approx([0.01, 0.36])
