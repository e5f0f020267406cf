"""Allocation from a forward pass, and by searching the number of heads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice.layers.sites import ATTENTION, FFN
from intraslice.methods.blockwise.allocators.base import Allocation
from intraslice.methods.blockwise.allocators.mask_gradient import MaskGradients, SiteGradients, allocate_by_head_search
from intraslice.methods.blockwise.allocators.profile import (
    ModelProfile,
    allocate_by_fluctuation,
    allocate_by_similarity,
    spread_loss,
)
from intraslice.methods.blockwise.options import AllocationOptions
from support.model_sites import kept_share, sites

L, H, WIDTH, F = 5, 4, 3, 20
ATTENTION_SIZE, FFN_SIZE = 240, 600
SITES = sites((ATTENTION_SIZE,) * L, (FFN_SIZE,) * L, heads=H, channels=F)
TOTAL = L * (ATTENTION_SIZE + FFN_SIZE)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _profile(seed: int = 0) -> ModelProfile:
    return ModelProfile(
        tuple(
            {
                ATTENTION: _random(H, WIDTH, seed=seed + layer).exp(),
                FFN: _random(F, 1, seed=seed + 50 + layer).exp(),
            }
            for layer in range(L)
        ),
        tuple(torch.rand(L, generator=torch.Generator().manual_seed(seed)).tolist()),
    )


def _gradients(seed: int = 0) -> MaskGradients:
    moments = torch.eye(WIDTH, dtype=torch.float64).expand(H, -1, -1)
    group = torch.eye(F, dtype=torch.float64)[None]
    return MaskGradients(
        tuple(
            {
                ATTENTION: SiteGradients(_random(6, H * WIDTH, seed=seed + layer), moments),
                FFN: SiteGradients(_random(6, F, seed=seed + 50 + layer), group),
            }
            for layer in range(L)
        )
    )


def _sparsity(allocation: Allocation) -> float:
    return 1.0 - kept_share(SITES, allocation.keep)


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
        "head_search": lambda *rest: allocate_by_head_search(_gradients(seed), *rest),
    }[name]
    allocation = allocate(SITES, sparsity, AllocationOptions(ffn_share=1.0))
    assert _sparsity(allocation) == pytest.approx(sparsity, abs=2e-3)
    assert all(0.1 - 1e-9 <= f <= 1.0 + 1e-9 for f in allocation.fractions(ATTENTION) + allocation.fractions(FFN))


def test_fluctuation_is_one_ranking_of_heads_and_channels():
    """Brute force: units in order of their standardised score are kept until their weights fill the budget."""
    profile = _profile()
    units = []
    for layer in range(L):
        context, act = profile.fluctuation[layer][ATTENTION].square(), profile.fluctuation[layer][FFN].flatten()
        for head in range(H):
            score = float(((context - context.mean()) / context.std())[head].mean())
            units.append((score, ATTENTION_SIZE // H, ("attention", layer)))
        for score in ((act - act.mean()) / act.std()).tolist():
            units.append((score, FFN_SIZE // F, ("ffn", layer)))
    units.sort(reverse=True)
    kept = dict.fromkeys([(name, layer) for name in ("attention", "ffn") for layer in range(L)], 0)
    spent, budget = 0, 0.6 * TOTAL
    for _, weight, block in units:
        if spent + weight > budget:
            break
        spent += weight
        kept[block] += weight
    found = allocate_by_fluctuation(profile, SITES, 0.4, AllocationOptions(max_site_sparsity=0.99))
    for layer in range(L):
        # What the last unit leaves over is spread over all blocks.
        assert found.fractions(ATTENTION)[layer] == pytest.approx(kept["attention", layer] / 240, abs=0.02)
        assert found.fractions(FFN)[layer] == pytest.approx(kept["ffn", layer] / 600, abs=0.02)


def test_similarity_is_a_softmax_over_all_but_the_least_similar_layers():
    similarity = (0.9, 0.80, 0.85, 0.9, 0.89)
    profile = ModelProfile(_profile().fluctuation, similarity)
    found = allocate_by_similarity(profile, SITES, 0.2, AllocationOptions(ffn_share=1.0, kept_layers=0.4))
    shares = [math.exp(10 * value) if index not in (1, 2) else 0.0 for index, value in enumerate(similarity)]
    lost = [0.2 * L * share / sum(shares) for share in shares]
    assert [1 - kept for kept in found.fractions(ATTENTION)] == pytest.approx(lost)
    assert [1 - kept for kept in found.fractions(FFN)] == pytest.approx(lost)


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_losses_stay_under_the_cap_and_kept_layers_lose_only_the_rest(layers):
    shares = [1.0 + index for index in range(layers)]
    for mean in (0.0, 0.1, 0.3, 0.7, 0.9):
        losses = spread_loss(shares, mean, 0.9, {0, layers - 1})
        assert sum(losses) == pytest.approx(mean * layers)
        assert all(0.0 <= lost <= 0.9 + 1e-12 for lost in losses)
        if losses[0] > 0:
            assert all(lost == pytest.approx(0.9) for lost in losses[1:-1])


@pytest.mark.parametrize("balance", [0.2, 2.0, 250.0])
def test_head_search_keeps_the_number_of_heads_with_the_most_importance(balance: float):
    gradients = _gradients()
    heads = [layer[ATTENTION].grad.view(6, H, WIDTH).sum(2).square().sum(0) for layer in gradients.layers]
    channels = [layer[FFN].grad.square().sum(0) for layer in gradients.layers]
    ranked = [torch.cat(units).sort(descending=True).values for units in (heads, channels)]
    budget = 0.7 * TOTAL
    values = {}
    for count in range(1, L * H + 1):
        left = int((budget - count * 60) / 30 + 1e-9)
        if 0.1 * L * F <= left <= L * F and count >= 0.1 * L * H:
            # A channel has half the weights of a head.
            values[count] = float(ranked[0][:count].sum() + balance / 2 * ranked[1][:left].sum())
    best = max(values, key=values.__getitem__)
    found = allocate_by_head_search(
        gradients, SITES, 0.3, AllocationOptions(max_site_sparsity=0.9, channel_balance=balance)
    )
    assert sum(found.fractions(ATTENTION)) * H == pytest.approx(best)
    threshold = ranked[0][best - 1]
    if all((layer >= threshold).any() for layer in heads):
        assert list(found.fractions(ATTENTION)) == pytest.approx(
            [float((layer >= threshold).sum()) / H for layer in heads]
        )
