"""Allocation from a forward pass, and by searching the number of heads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice.methods.blockwise.allocators import (
    BlockSizes,
    LayerProfile,
    MaskScores,
    allocate_by_fluctuation,
    allocate_by_head_search,
    allocate_by_similarity,
)
from intraslice.methods.blockwise.allocators.profile import spread_loss
from intraslice.methods.blockwise.options import AllocationOptions

L, H, WIDTH, F = 5, 4, 3, 20
SIZES = BlockSizes((240,) * L, (600,) * L)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _profile(seed: int = 0) -> LayerProfile:
    return LayerProfile(
        tuple(_random(H, WIDTH, seed=seed + layer).exp() for layer in range(L)),
        tuple(_random(F, seed=seed + 50 + layer).exp() for layer in range(L)),
        tuple(torch.rand(L, generator=torch.Generator().manual_seed(seed)).tolist()),
    )


def _mask_scores(seed: int = 0) -> MaskScores:
    moments = torch.eye(WIDTH, dtype=torch.float64).expand(H, -1, -1)
    return MaskScores(
        tuple(_random(6, H * WIDTH, seed=seed + layer) for layer in range(L)),
        tuple(_random(6, F, seed=seed + 50 + layer) for layer in range(L)),
        (moments,) * L,
        (torch.eye(F, dtype=torch.float64)[None],) * L,
    )


def _sparsity(allocation) -> float:
    kept = sum(f * s for f, s in zip(allocation.attention + allocation.ffn, SIZES.attention + SIZES.ffn, strict=True))
    return 1.0 - kept / sum(SIZES.attention + SIZES.ffn)


@settings(max_examples=30, deadline=None)
@given(
    sparsity=st.floats(0.0, 0.85),
    seed=st.integers(0, 50),
    name=st.sampled_from(["fluctuation", "similarity", "head_search"]),
)
def test_the_budget_and_the_cap_hold(sparsity, seed, name):
    allocate = {
        "fluctuation": lambda *rest: allocate_by_fluctuation(_profile(seed), *rest),
        "similarity": lambda *rest: allocate_by_similarity(_profile(seed), *rest),
        "head_search": lambda *rest: allocate_by_head_search(_mask_scores(seed), *rest),
    }[name]
    allocation = allocate(SIZES, sparsity, AllocationOptions(ffn_bias=1.0))
    assert _sparsity(allocation) == pytest.approx(sparsity, abs=2e-3)
    assert all(0.1 - 1e-9 <= f <= 1.0 + 1e-9 for f in allocation.attention + allocation.ffn)


def test_fluctuation_is_one_ranking_of_heads_and_channels():
    """Brute force: units in order of their standardised score are kept until their weights fill the budget."""
    profile = _profile()
    units = []
    for layer in range(L):
        context, act = profile.context_fluctuation[layer].square(), profile.act_fluctuation[layer]
        for head in range(H):
            score = float(((context - context.mean()) / context.std())[head].mean())
            units.append((score, SIZES.attention[layer] // H, ("attention", layer)))
        for score in ((act - act.mean()) / act.std()).tolist():
            units.append((score, SIZES.ffn[layer] // F, ("ffn", layer)))
    units.sort(reverse=True)
    kept = dict.fromkeys([(name, layer) for name in ("attention", "ffn") for layer in range(L)], 0)
    spent, budget = 0, 0.6 * sum(SIZES.attention + SIZES.ffn)
    for _, weight, block in units:
        if spent + weight > budget:
            break
        spent += weight
        kept[block] += weight
    found = allocate_by_fluctuation(profile, SIZES, 0.4, AllocationOptions(max_block_sparsity=0.99))
    for layer in range(L):
        # What the last unit leaves over is spread over all blocks.
        assert found.attention[layer] == pytest.approx(kept["attention", layer] / 240, abs=0.02)
        assert found.ffn[layer] == pytest.approx(kept["ffn", layer] / 600, abs=0.02)


def test_similarity_is_a_softmax_over_the_inner_layers():
    similarity = (0.9, 0.80, 0.85, 0.9, 0.99)
    profile = LayerProfile(_profile().context_fluctuation, _profile().act_fluctuation, similarity)
    found = allocate_by_similarity(profile, SIZES, 0.2, AllocationOptions(ffn_bias=1.0))
    shares = [math.exp(10 * value) for value in similarity[1:-1]]
    lost = [0.0, *(0.2 * L * share / sum(shares) for share in shares), 0.0]
    assert [1 - kept for kept in found.attention] == pytest.approx(lost)
    assert [1 - kept for kept in found.ffn] == pytest.approx(lost)


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_losses_stay_under_the_cap_and_outer_layers_lose_only_the_rest(layers):
    shares = [1.0 + index for index in range(layers)]
    for mean in (0.0, 0.1, 0.3, 0.7, 0.9):
        losses = spread_loss(shares, mean, 0.9)
        assert sum(losses) == pytest.approx(mean * layers)
        assert all(0.0 <= lost <= 0.9 + 1e-12 for lost in losses)
        if losses[0] > 0:
            assert all(lost == pytest.approx(0.9) for lost in losses[1:-1])


def test_head_search_keeps_the_number_of_heads_with_the_most_importance():
    scores = _mask_scores()
    heads = [grad.view(6, H, WIDTH).sum(2).square().sum(0) for grad in scores.context_grad]
    channels = [grad.square().sum(0) for grad in scores.act_grad]
    ranked = [torch.cat(units).sort(descending=True).values for units in (heads, channels)]
    budget = 0.7 * sum(SIZES.attention + SIZES.ffn)
    values = {}
    for count in range(1, L * H + 1):
        left = int((budget - count * 60) / 30 + 1e-9)
        if 0.1 * L * F <= left <= L * F and count >= 0.1 * L * H:
            values[count] = float(ranked[0][:count].sum() + ranked[1][:left].sum())
    best = max(values, key=values.__getitem__)
    found = allocate_by_head_search(scores, SIZES, 0.3, AllocationOptions(max_block_sparsity=0.9))
    assert sum(found.attention) * H == pytest.approx(best)
    threshold = ranked[0][best - 1]
    if all((layer >= threshold).any() for layer in heads):
        assert list(found.attention) == pytest.approx([float((layer >= threshold).sum()) / H for layer in heads])
