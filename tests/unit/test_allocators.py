"""Allocation meets the budget exactly, obeys the caps, and ranks as the equations say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice.errors import BudgetError
from intraslice.methods.blockwise.allocators import (
    BlockSizes,
    MaskScores,
    allocate_by_mask_gradient,
    allocate_uniform,
    count_units,
)
from intraslice.methods.blockwise.allocators.mask_gradient import channel_importance, keep_fractions
from intraslice.methods.blockwise.options import AllocationOptions

SIZES = BlockSizes((600,) * 4, (1400,) * 4)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _scores(seed: int = 0) -> MaskScores:
    layer_scale = [10.0 ** (seed % 3 - layer) for layer in range(4)]
    x = [_random(50, 24, seed=layer + 100) for layer in range(4)]
    blocks = [torch.stack([part.T @ part for part in layer.split(8, 1)]) for layer in x]
    return MaskScores(
        tuple(_random(6, 24, seed=seed + layer) * scale for layer, scale in enumerate(layer_scale)),
        tuple(_random(6, 56, seed=seed + 10 + layer) * scale for layer, scale in enumerate(layer_scale)),
        tuple(blocks),
        tuple(torch.stack([torch.eye(7, dtype=torch.float64)] * 8) for _ in range(4)),
    )


def _sparsity(allocation) -> float:
    kept = sum(f * s for f, s in zip(allocation.attention, SIZES.attention, strict=True))
    kept += sum(f * s for f, s in zip(allocation.ffn, SIZES.ffn, strict=True))
    return 1.0 - kept / (sum(SIZES.attention) + sum(SIZES.ffn))


@settings(max_examples=40, deadline=None)
@given(sparsity=st.floats(0.0, 0.85), seed=st.integers(0, 50), rotate=st.booleans())
def test_mask_gradient_meets_the_budget_and_the_cap(sparsity, seed, rotate):
    options = AllocationOptions(pca_attention=rotate, pca_ffn=rotate)
    allocation = allocate_by_mask_gradient(_scores(seed), SIZES, sparsity, options)
    assert _sparsity(allocation) == pytest.approx(sparsity, abs=1e-3)
    assert all(0.1 - 1e-9 <= f <= 1.0 for f in (*allocation.attention, *allocation.ffn))


def test_more_important_layers_keep_more():
    allocation = allocate_by_mask_gradient(_scores(), SIZES, 0.4, AllocationOptions())
    assert list(allocation.ffn) == sorted(allocation.ffn, reverse=True)
    assert allocation.ffn[0] > allocation.ffn[-1]


def test_keep_fractions_is_a_global_top_k_without_caps():
    importance = [torch.rand(10, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    fractions = keep_fractions(importance, [100, 100, 100], 0.4, 1.0)
    threshold = torch.cat(importance).sort(descending=True).values[17]
    for fraction, unit in zip(fractions, importance, strict=True):
        assert fraction == pytest.approx(float((unit >= threshold).double().mean()), abs=1e-9)


def test_importance_is_equation_10_and_11():
    grads, x = _random(5, 12), _random(40, 12, seed=1)
    assert torch.allclose(channel_importance(grads, None), grads.square().sum(0))
    blocks = torch.stack([part.T @ part for part in x.split(6, 1)])
    vectors = torch.block_diag(*(torch.linalg.eigh(block).eigenvectors.flip(1) for block in blocks))
    assert torch.allclose(channel_importance(grads, blocks), (grads @ vectors).square().sum(0))


def test_rotation_moves_importance_but_keeps_the_total_of_each_block():
    grads, x = _random(5, 12), _random(40, 12, seed=1)
    blocks = torch.stack([part.T @ part for part in x.split(6, 1)])
    plain, rotated = channel_importance(grads, None), channel_importance(grads, blocks)
    assert torch.allclose(plain.view(2, 6).sum(1), rotated.view(2, 6).sum(1))


def test_ffn_bias_shifts_the_loss_between_attention_and_ffn():
    allocation = allocate_uniform(SIZES, 0.3, AllocationOptions(ffn_bias=0.8))
    assert allocation.ffn[0] == pytest.approx(1 - 0.24)
    assert allocation.attention[0] < allocation.ffn[0]
    assert _sparsity(allocation) == pytest.approx(0.3)


def test_zero_sparsity_keeps_everything():
    allocation = allocate_uniform(SIZES, 0.0, AllocationOptions())
    assert set(allocation.attention + allocation.ffn) == {1.0}


@pytest.mark.parametrize(("sparsity", "bias"), [(0.88, 1.1), (0.5, 2.0), (0.5, 0.2), (0.9, 1.0), (0.3, 50.0)])
def test_a_bias_beyond_the_cap_gives_the_rest_to_the_other_block(sparsity, bias):
    allocation = allocate_uniform(SIZES, sparsity, AllocationOptions(ffn_bias=bias))
    assert _sparsity(allocation) == pytest.approx(sparsity)
    assert all(0.1 - 1e-9 <= f <= 1.0 + 1e-9 for f in (*allocation.attention, *allocation.ffn))


def test_an_unreachable_budget_is_refused_with_numbers():
    with pytest.raises(BudgetError, match=r"0\.93.*90%"):
        count_units(SIZES, 0.93, AllocationOptions(), num_heads=4, num_key_value_heads=4)


@pytest.mark.parametrize(("sparsity", "heads"), [(0.0, 0), (0.2, 1), (0.3, 2), (0.5, 4)])
def test_units_of_grouped_queries_are_query_heads(sparsity, heads):
    options = AllocationOptions(count="units", ffn_bias=1.0)
    units = count_units(SIZES, sparsity, options, num_heads=9, num_key_value_heads=3)
    assert units.sparsity * (0.75 * 600 + 1400) == pytest.approx(sparsity * 2000)
    uniform = allocate_uniform(units.sizes, units.sparsity, options)
    assert uniform.attention == pytest.approx(uniform.ffn)  # the same share of query heads as of channels
    # The nine query heads have three quarters of the weights; of what is not a whole head, the FFN loses more.
    weighed = units.weigh(uniform)
    assert weighed.attention == pytest.approx((1 - 0.75 * heads / 9,) * 4)
    assert _sparsity(weighed) == pytest.approx(sparsity)


def test_units_without_groups_are_heads_and_weights_are_left_alone():
    alone = count_units(SIZES, 0.3, AllocationOptions(count="units", ffn_bias=1.0), num_heads=9, num_key_value_heads=9)
    assert alone.sizes == SIZES and alone.sparsity == 0.3
    uniform = allocate_uniform(alone.sizes, alone.sparsity, AllocationOptions(ffn_bias=1.0))
    assert alone.weigh(uniform).attention == pytest.approx((7 / 9,) * 4)
    weights = count_units(SIZES, 0.3, AllocationOptions(), num_heads=9, num_key_value_heads=3)
    assert weights.sizes == SIZES and weights.weigh(uniform) == uniform


def test_an_unreachable_share_of_units_is_refused_with_the_sparsity_that_was_asked_for():
    with pytest.raises(BudgetError, match=r"0\.88.*90% of its units"):
        count_units(SIZES, 0.88, AllocationOptions(count="units"), num_heads=9, num_key_value_heads=3)
