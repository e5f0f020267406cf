"""The budget: exact accounts, never more left over than later sites can take, and met whenever it can be."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice.algebra.selection import TOLERANCE
from intraslice.errors import BudgetError
from intraslice.layers.sites import ATTENTION, FFN, ModelSites
from intraslice.methods.blockwise.allocators.base import Allocation
from intraslice.methods.blockwise.budget import Budget, allowed_miss
from intraslice.methods.blockwise.options import BlockwiseOptions, FFNOptions
from support.model_sites import kept_share, sites

HEADS, CHANNELS, CHANNEL_WEIGHTS, HEAD_WEIGHTS = 8, 64, 100, 400
ATTENTION_WEIGHTS, FFN_WEIGHTS = HEADS * HEAD_WEIGHTS, CHANNELS * CHANNEL_WEIGHTS


def layers(count: int) -> ModelSites:
    return sites((ATTENTION_WEIGHTS,) * count, (FFN_WEIGHTS,) * count, heads=HEADS, channels=CHANNELS)


def with_steps(multiple: int) -> BlockwiseOptions:
    return BlockwiseOptions(ffn=FFNOptions(ffn_multiple=multiple))


def plan(model: ModelSites, attention: Sequence[float], ffn: Sequence[float]) -> Allocation:
    return Allocation.of_kinds(model, {ATTENTION: attention, FFN: ffn})


def spend(budget: Budget, model: ModelSites, overdraws: Sequence[float]) -> list[int]:
    """Prune as the engine does: attention overdraws what it is given, FFNs take what the budget says.

    Returns:
        The channels of each layer; `budget.carry` is what is left over.
    """
    kept = []
    for index, ((attention, ffn), overdraw) in enumerate(zip(model.layers, overdraws, strict=True)):
        granted = budget.planned(index, attention)
        available = budget.planned(index, ffn) + budget.carry + granted
        spent = granted + overdraw
        kept.append(budget.channels(index, ffn, available - spent))
        budget.carry = available - (spent + kept[-1] * ffn.unit_weights)
    return kept


def carried_blindly(model: ModelSites, allocation: Allocation, multiple: int, overdraws: Sequence[float]) -> float:
    """Return what is left over when every FFN takes the width nearest to what is left, whatever comes after it."""
    carry = 0.0
    widths = [*range(multiple, CHANNELS, multiple), CHANNELS]
    for fraction, overdraw in zip(allocation.fractions(FFN), overdraws, strict=True):
        wanted = fraction * FFN_WEIGHTS + carry - overdraw
        carry = wanted - CHANNEL_WEIGHTS * min(widths, key=lambda width: abs(width - wanted / CHANNEL_WEIGHTS))
    return carry


@pytest.mark.parametrize(
    ("multiple", "expected"),
    [(1, [*range(1, 65)]), (8, [8, 16, 24, 32, 40, 48, 56, 64]), (24, [24, 48, 64]), (64, [64]), (100, [64])],
)
def test_widths_are_multiples_and_the_dense_one(multiple, expected):
    model = layers(1)
    allocation = plan(model, [1.0], [0.5])
    assert Budget(model, allocation, with_steps(multiple)).widths(model.layers[0][1]) == expected


def test_what_is_planned_is_the_share_of_the_weights():
    model = layers(2)
    budget = Budget(model, plan(model, [0.5, 1.0], [0.25, 0.75]), BlockwiseOptions())
    planned = [[budget.planned(index, site) for site in each] for index, each in enumerate(model.layers)]
    assert planned == [[0.5 * ATTENTION_WEIGHTS, 0.25 * FFN_WEIGHTS], [ATTENTION_WEIGHTS, 0.75 * FFN_WEIGHTS]]


def test_the_nearest_width_is_taken_where_later_sites_have_room():
    model = layers(3)
    budget = Budget(model, plan(model, [0.5] * 3, [0.5] * 3), with_steps(8))
    ffn = model.layers[0][1]
    for wanted, channels in ((31 * 100, 32), (27 * 100, 24), (0.0, 8), (9e9, 64)):
        assert budget.channels(0, ffn, wanted) == channels


CASES = {
    # Less than the smallest width is planned at the end: only the first layers can save for it.
    "the last are nearly empty": ([0.5] * 6, [0.6, 0.6, 0.6, 0.02, 0.02, 0.02], 8, [0.0] * 6),
    # Heads of the last layers weigh more than planned, and their FFNs have nothing to give.
    "the last overdraw": ([0.5] * 6, [0.6, 0.6, 0.6, 0.126, 0.126, 0.126], 8, [0, 0, 0, 300.0, 350.0, 300.0]),
    # And the other way round: nothing can be added at the end.
    "the last are full": ([0.5] * 6, [0.5, 0.5, 0.5, 1.0, 1.0, 1.0], 8, [0, 0, 0, -300.0, -350.0, -300.0]),
    "the first overdraw, the last are full": (
        [0.5] * 6,
        [0.5, 0.5, 0.5, 1.0, 1.0, 1.0],
        8,
        [400.0, 400.0, 400.0, -390.0, -390.0, -390.0],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_plan_that_blind_carrying_misses_is_met(name):
    attention, ffn, multiple, overdraws = CASES[name]
    model = layers(len(ffn))
    allocation = plan(model, attention, ffn)
    half = multiple * CHANNEL_WEIGHTS / 2
    # The case is a bad one: several steps too many, more than a percent of the model.
    blind = carried_blindly(model, allocation, multiple, overdraws)
    assert abs(blind) > 1.5 * half and abs(blind) / model.num_weights > 0.01
    budget = Budget(model, allocation, with_steps(multiple))
    budget.check(1.0 - kept_share(model, allocation.keep))
    kept = spend(budget, model, overdraws)
    assert abs(budget.carry) <= half + 1e-6
    # And the account is right.
    spent = sum(width * CHANNEL_WEIGHTS for width in kept) + sum(overdraws)
    assert budget.carry == pytest.approx(sum(ffn) * FFN_WEIGHTS - spent)


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[float], list[float], int]:
    count = draw(st.integers(1, 6))
    fractions = st.lists(st.floats(0.01, 1.0), min_size=count, max_size=count)
    return draw(fractions), draw(fractions), draw(st.sampled_from([1, 4, 8, 16, 24, 32, 64]))


def possible_range(count: int, multiple: int) -> tuple[float, float]:
    return count * min(multiple, CHANNELS) * CHANNEL_WEIGHTS, count * FFN_WEIGHTS


@settings(max_examples=300, deadline=None)
@given(plans())
def test_the_last_miss_is_half_a_step_whenever_there_is_a_choice(drawn):
    """Without surprises from attention every sum between the narrowest and the dense widths is met."""
    attention, ffn, multiple = drawn
    model, half = layers(len(ffn)), multiple * CHANNEL_WEIGHTS / 2
    allocation = plan(model, attention, ffn)
    budget = Budget(model, allocation, with_steps(multiple))
    # Attention that keeps its plan: the heads are planned as well.
    spend(budget, model, [0.0] * len(ffn))
    low, high = possible_range(len(ffn), multiple)
    wanted = sum(ffn) * FFN_WEIGHTS
    if low <= wanted <= high:
        assert abs(budget.carry) <= half + 1e-6
    else:
        assert budget.carry == pytest.approx(wanted - (low if wanted < low else high))


@settings(max_examples=300, deadline=None)
@given(plans(), st.data())
def test_heads_that_weigh_more_or_less_than_planned_change_nothing(drawn, data):
    """The same with attention that is up to a head off, as long as the FFNs together can make up for all of it."""
    attention, ffn, multiple = drawn
    model, half = layers(len(ffn)), multiple * CHANNEL_WEIGHTS / 2
    allocation = plan(model, attention, ffn)
    overdraws = [
        0.0 if fraction >= 1.0 else data.draw(st.floats(-HEAD_WEIGHTS, HEAD_WEIGHTS)) for fraction in attention
    ]
    budget = Budget(model, allocation, with_steps(multiple))
    spend(budget, model, overdraws)
    low, high = possible_range(len(ffn), multiple)
    # Nobody knows beforehand how the heads fall, so there is a choice only with room for all of them.
    wanted, slack = sum(ffn) * FFN_WEIGHTS, sum(HEAD_WEIGHTS for fraction in attention if fraction < 1.0)
    if low + slack <= wanted <= high - slack:
        assert abs(budget.carry) <= half + 1e-6


@settings(max_examples=200, deadline=None)
@given(plans())
def test_what_no_widths_reach_is_refused_and_all_else_is_not(drawn):
    attention, ffn, multiple = drawn
    model = layers(len(ffn))
    allocation = plan(model, attention, ffn)
    low, high = possible_range(len(ffn), multiple)
    wanted = sum(ffn) * FFN_WEIGHTS
    miss = max(low - wanted, wanted - high, 0.0) / model.num_weights
    allowed = max(TOLERANCE, min(0.02, multiple * CHANNEL_WEIGHTS / 2 / model.num_weights))
    budget, sparsity = Budget(model, allocation, with_steps(multiple)), 1.0 - kept_share(model, allocation.keep)
    if miss > allowed + 1e-9:
        with pytest.raises(BudgetError, match=rf"ffn\.ffn_multiple = {multiple} allow reach only 0\.\d+"):
            budget.check(sparsity)
    elif multiple * CHANNEL_WEIGHTS / 2 / model.num_weights <= 0.02:
        budget.check(sparsity)
    assert budget.carry == 0.0, "checking spends nothing"


def test_the_refusal_says_what_can_be_reached():
    model = layers(2)
    allocation = plan(model, [1.0, 1.0], [0.3, 0.3])
    with pytest.raises(
        BudgetError, match="sparsity 0.466667 was asked for.*ffn.ffn_multiple = 64 allow reach only 0.0000"
    ):
        Budget(model, allocation, with_steps(64)).check(1.0 - kept_share(model, allocation.keep))


@pytest.mark.parametrize(
    ("steps", "total", "expected"),
    [([100.0, 50.0], 1e6, TOLERANCE), ([1600.0], 1e5, 0.008), ([1e4], 1e5, 0.02), ([], 1e5, TOLERANCE)],
)
def test_half_a_step_of_the_smallest_ffn_is_allowed_within_bounds(steps, total, expected):
    assert allowed_miss(steps, total) == expected
