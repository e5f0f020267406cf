"""Steps of a search over how much each site loses. Pure. Papers: Týr-the-Pruner, EvoPress.

A site stands on one of its levels, a whole number of steps away from where the round began; more steps lose more. A
move takes one site a step up and another one of the same group a step down, which loses as many weights as before.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from intraslice.layers.sites import ATTENTION, FFN, ModelSites
from intraslice.methods.blockwise.allocators.base import Allocation
from intraslice.methods.blockwise.allocators.profile import spread_loss
from intraslice.methods.blockwise.options import AllocationOptions

MOST_MOVES = 4
"""How many moves make one offspring at most; the published number."""

Levels = tuple[int, ...]
"""Where each site stands, in the order in which sites run."""


Ladder = Mapping[int, float]
"""The levels of one site: the share of its weights that it loses on each one, by the number of steps."""


def ladder_around(loss: float, step: float, count: int, cap: float) -> Ladder:
    """Return the levels around a loss that are neither below 0 nor above the cap; the loss itself is always one.

    Args:
        loss: where the site stands.
        step: share of its weights.
        count: how many levels there are at most, an odd number.
        cap: the most that it may lose.
    """
    found = {number: loss + number * step for number in range(-(count // 2), count // 2 + 1)}
    tiny = 1e-9
    inside = {number: min(max(value, 0.0), cap) for number, value in found.items() if -tiny <= value <= cap + tiny}
    return {**inside, 0: loss}


def ladders_of(
    sites: ModelSites, keep: Sequence[Mapping[str, float]], spacing: float, options: AllocationOptions
) -> list[Ladder]:
    """Return the ladder of each site, in the order in which sites run.

    Args:
        sites: of the model.
        keep: for each layer, by the name of the site, what it keeps.
        spacing: of the levels: share of the weights of a site, or with moves among all sites of those of a mean site.
        options: settings.
    """
    every = sites.every()
    mean = sites.num_weights / len(every)
    return [
        ladder_around(
            1.0 - keep[layer][site.name],
            spacing if options.search_moves == "kind" else spacing * mean / site.num_weights,
            options.search_levels,
            max(options.max_site_sparsity, 1.0 - keep[layer][site.name]),
        )
        for layer, site in every
    ]


def groups_of(sites: ModelSites, moves: str) -> list[list[int]]:
    """Return the numbers of the sites among which weights move: those of one kind, or all."""
    kinds = [site.kind for _, site in sites.every()]
    if moves == "any":
        return [list(range(len(kinds)))]
    return [[number for number, kind in enumerate(kinds) if kind == wanted] for wanted in (ATTENTION, FFN)]


def offspring(
    parent: Levels, ladders: Sequence[Ladder], groups: Sequence[Sequence[int]], draw: random.Random
) -> Levels:
    """Return levels that are up to `MOST_MOVES` moves away from a parent's; the parent's where no move is possible."""
    levels = list(parent)
    for _ in range(draw.randint(1, MOST_MOVES)):
        group = draw.choice(groups)
        up = [number for number in group if levels[number] + 1 in ladders[number]]
        if not up:
            continue
        loses = draw.choice(up)
        down = [number for number in group if number != loses and levels[number] - 1 in ladders[number]]
        if down:
            levels[loses] += 1
            levels[draw.choice(down)] -= 1
    return tuple(levels)


def kept_on(sites: ModelSites, ladders: Sequence[Ladder], levels: Levels) -> tuple[Mapping[str, float], ...]:
    """Return what each site keeps, for each layer by the name of the site."""
    losses = iter(ladder[level] for ladder, level in zip(ladders, levels, strict=True))
    return tuple({site.name: 1.0 - next(losses) for site in of_layer} for of_layer in sites.layers)


def allocate_by_search(
    measured: Sequence[Mapping[str, float]], sites: ModelSites, sparsity: float, options: AllocationOptions
) -> Allocation:
    """Return what the search has found, brought to the sparsity where rounding or a cap has moved it.

    Args:
        measured: for each layer, by the name of the site, what it keeps.
        sites: with what counts of their weights.
        sparsity: fraction of these to remove.
        options: settings; max_site_sparsity caps what a site may lose.
    """
    every = sites.every()
    found = [1.0 - measured[layer][site.name] for layer, site in every]
    weights = [site.num_weights for _, site in every]
    lost = iter(spread_loss(found, sparsity, options.max_site_sparsity, (), weights))
    return Allocation(tuple({site.name: 1.0 - next(lost) for site in of_layer} for of_layer in sites.layers))
