"""Moves of a search: weights stay as many, levels stay where there are some, and the budget is met afterwards."""

from __future__ import annotations

import random

import pytest

from intraslice.layers.sites import ATTENTION, FFN, ModelSites, Site
from intraslice.methods.blockwise.allocators.search import (
    MOST_MOVES,
    allocate_by_search,
    groups_of,
    kept_on,
    ladder_around,
    ladders_of,
    offspring,
)
from intraslice.methods.blockwise.options import AllocationOptions

SITES = ModelSites(
    tuple(
        (
            Site(name="attention", kind=ATTENTION, units=8, unit_weights=100, num_groups=4, num_weights=1200),
            Site(name="ffn", kind=FFN, units=64, unit_weights=60, num_groups=64, num_weights=3840),
        )
        for _ in range(3)
    )
)
UNIFORM = tuple({"attention": 0.7, "ffn": 0.7} for _ in range(3))


def removed(keep) -> float:
    return sum((1 - keep[layer][site.name]) * site.num_weights for layer, of in enumerate(SITES.layers) for site in of)


def test_levels_end_at_nothing_and_at_the_cap():
    ladder = ladder_around(0.3, 0.125, 9, 0.6)
    assert list(ladder) == [-2, -1, 0, 1, 2]
    assert list(ladder.values()) == pytest.approx([0.05, 0.175, 0.3, 0.425, 0.55])
    # Where a site stands is always a level, even beyond the cap; a level may be the cap, or nothing at all.
    assert ladder_around(0.95, 0.1, 3, 0.9) == {0: 0.95, -1: pytest.approx(0.85)}
    assert ladder_around(0.25, 0.125, 5, 0.5) == {-2: 0.0, -1: 0.125, 0: 0.25, 1: 0.375, 2: 0.5}


@pytest.mark.parametrize("moves", ["kind", "any"])
def test_moves_lose_as_many_weights(moves):
    options = AllocationOptions(search_moves=moves, search_levels=5)
    ladders, groups = ladders_of(SITES, UNIFORM, 0.1, options), groups_of(SITES, moves)
    draw, parent, seen = random.Random(0), (0,) * 6, set()
    for _ in range(500):
        child = offspring(parent, ladders, groups, draw)
        assert sum(abs(new - old) for new, old in zip(child, parent, strict=True)) <= 2 * MOST_MOVES
        keep = kept_on(SITES, ladders, child)
        assert removed(keep) == pytest.approx(removed(UNIFORM))
        assert all(0.0 <= kept <= 1.0 for layer in keep for kept in layer.values())
        if moves == "kind":
            assert sum(child[::2]) == sum(child[1::2]) == 0
        seen.add(child)
        parent = child if draw.random() < 0.5 else parent
    assert len(seen) > 100
    if moves == "any":
        assert any(sum(child[::2]) for child in seen)


def test_nothing_moves_where_nothing_can():
    stuck = [{0: 0.3}] * 6
    assert offspring((0,) * 6, stuck, groups_of(SITES, "kind"), random.Random(0)) == (0,) * 6


def test_the_budget_is_met_with_what_was_found():
    found = ({"attention": 0.2, "ffn": 0.9}, {"attention": 1.0, "ffn": 0.5}, {"attention": 0.9, "ffn": 0.68})
    for sparsity in (0.2, 0.3):
        keep = allocate_by_search(found, SITES, sparsity, AllocationOptions(max_site_sparsity=0.85)).keep
        assert removed(keep) == pytest.approx(sparsity * SITES.num_weights)
        assert keep[1]["attention"] == 1.0 and all(layer["attention"] >= 0.15 - 1e-9 for layer in keep)
    same = allocate_by_search(UNIFORM, SITES, 0.3, AllocationOptions()).keep
    assert all(layer == pytest.approx(UNIFORM[0]) for layer in same)
