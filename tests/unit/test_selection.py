"""Discrete choices against brute force and their invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice.algebra.selection import (
    adaptive_heads,
    heads_per_kv,
    kept_kv_heads,
    reconstruction_score,
    round_to_multiple,
    top_indices,
    whole_heads,
)


def _spectrum(num_heads: int, head_dim: int, seed: int) -> torch.Tensor:
    values = torch.rand(num_heads, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (values**4).sort(-1, descending=True).values


def _greedy_by_hand(scores, spectrum, total_dims, min_width):
    """Algorithm 2 for one kv head a query head, written out: P dimensions shared by the kept heads."""
    head_dim = spectrum.shape[1]
    kept = list(range(len(scores)))

    def score(head, width):
        cumulative = torch.cat([torch.zeros(1).double(), spectrum[head].cumsum(0)])
        low = int(min(width, head_dim))
        high = min(low + 1, head_dim)
        inside = cumulative[low] + (min(width, head_dim) - low) * (cumulative[high] - cumulative[low])
        return float(scores[head] * inside / cumulative[-1])

    while len(kept) > 1:
        width = total_dims / len(kept)
        values = {head: score(head, width) for head in kept}
        weakest = min(kept, key=values.get)
        wider = total_dims / (len(kept) - 1)
        gain = sum(score(head, wider) for head in kept if head != weakest) - sum(values.values())
        if gain <= 0 and min(width, head_dim) >= min_width:
            break
        kept.remove(weakest)
    return tuple(kept)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.2, 1.0), min_fraction=st.sampled_from([0.0, 0.5, 0.75]))
def test_adaptive_heads_is_algorithm_2(seed, share, min_fraction):
    num_heads, head_dim = 6, 8
    spectrum = _spectrum(num_heads, head_dim, seed)
    scores = torch.rand(num_heads, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)) ** 3
    dims = share * num_heads * head_dim
    choice = adaptive_heads(
        scores, spectrum, budget_dims=2 * dims, group=1, min_width=min_fraction * head_dim, groups="ragged"
    )
    assert choice.heads == _greedy_by_hand(scores, spectrum, dims, min_fraction * head_dim)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.3, 1.0))
def test_by_score_every_head_is_tried_once_and_counted_in_query_dimensions(seed, share):
    """Algorithm 2, line 9 to 15, with the published budget: P = share * H * d dimensions of the queries alone."""
    H, d, group = 6, 8, 3
    spectrum = _spectrum(H, d, seed)
    scores = torch.rand(H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)) ** 3
    choice = adaptive_heads(
        scores,
        spectrum,
        budget_dims=share * d * (H + H // group),
        group=group,
        min_width=0.75 * d,
        groups="ragged",
        budget="queries",
        order="score",
    )

    def total(heads: list[int]) -> float:
        width = min(d, share * H * d / len(heads))
        return float(reconstruction_score(scores, spectrum, heads, width).sum())

    kept = list(range(H))
    for head in sorted(range(H), key=lambda head: float(scores[head])):
        rest = [other for other in kept if other != head]
        if not rest or share * H * d / len(rest) > d:
            continue
        if total(rest) > total(kept) or share * H * d / len(kept) < 0.75 * d:
            kept = rest
    assert choice.heads == tuple(kept)
    assert choice.width == pytest.approx(min(d, share * H * d / len(kept)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.15, 1.0), groups=st.sampled_from(["ragged", "uniform"]))
def test_adaptive_heads_respects_groups_and_minimum_width(seed, share, groups):
    spectrum = _spectrum(12, 8, seed)
    scores = spectrum.sum(-1)
    choice = adaptive_heads(scores, spectrum, budget_dims=share * 16 * 8, group=3, min_width=6.0, groups=groups)
    sizes = heads_per_kv(choice.heads, 3)
    assert sum(sizes) == len(choice.heads)
    if groups == "uniform":
        assert len(set(sizes)) == 1
    assert choice.width >= 6.0 or len(choice.heads) == 1 or (groups == "uniform" and sizes == (1,))
    assert choice.width <= 8.0


def test_keeping_everything_needs_no_removal():
    spectrum = _spectrum(6, 8, 0)
    choice = adaptive_heads(spectrum.sum(-1), spectrum, budget_dims=8 * 8, group=3, min_width=6.0, groups="ragged")
    assert choice.heads == tuple(range(6))
    assert choice.width == 8.0


def test_reconstruction_score_is_all_of_the_head_at_full_width():
    spectrum = _spectrum(3, 8, 0)
    scores = torch.tensor([1.0, 2.0, 3.0]).double()
    assert torch.allclose(reconstruction_score(scores, spectrum, [0, 1, 2], 8.0), scores)


def test_permuting_heads_permutes_the_choice():
    spectrum = _spectrum(6, 8, 3)
    scores = torch.rand(6, generator=torch.Generator().manual_seed(4)).double()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    plain = adaptive_heads(scores, spectrum, budget_dims=60.0, group=1, min_width=6.0, groups="ragged")
    permuted = adaptive_heads(scores[order], spectrum[order], budget_dims=60.0, group=1, min_width=6.0, groups="ragged")
    assert {int(order[head]) for head in permuted.heads} == set(plain.heads)


def test_whole_heads_drops_the_weakest_and_lands_near_the_budget():
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    choice = whole_heads(scores, budget_dims=8 * 8, head_dim=8, group=1, groups="ragged")
    assert choice.heads == (0, 2, 4, 5)


def test_whole_heads_counts_the_kv_head_that_falls_with_its_last_query_head():
    scores = torch.tensor([1.0, 1.1, 5.0, 6.0])
    choice = whole_heads(scores, budget_dims=3 * 8, head_dim=8, group=2, groups="ragged")
    assert choice.heads == (2, 3)
    assert kept_kv_heads(choice.heads, 2) == (1,)


@given(value=st.floats(-10, 300), multiple=st.sampled_from([1, 8, 32]), high=st.integers(32, 250))
def test_round_to_multiple_is_the_nearest_allowed(value, multiple, high):
    result = round_to_multiple(value, multiple, min(multiple, high), high)
    allowed = [*range(multiple, high + 1, multiple), high]
    assert result in allowed
    assert abs(result - value) <= min(abs(width - value) for width in allowed) + 1e-9


def test_top_indices_breaks_ties_towards_the_lower_index():
    assert top_indices(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2).tolist() == [1, 2]
