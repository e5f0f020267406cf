"""Allocation meets the budget exactly, obeys the caps, and ranks as the equations say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice.errors import BudgetError
from intraslice.layers.sites import ATTENTION, FFN
from intraslice.methods.blockwise.allocators.base import Allocation, count_units
from intraslice.methods.blockwise.allocators.mask_gradient import (
    MaskGradients,
    SiteGradients,
    allocate_by_mask_gradient,
    channel_importance,
    keep_fractions,
)
from intraslice.methods.blockwise.allocators.uniform import allocate_uniform
from intraslice.methods.blockwise.gradient_pass import rotated_mask_gradient
from intraslice.methods.blockwise.options import AllocationOptions
from support.model_sites import kept_share, sites

ATTENTION_SIZES, FFN_SIZES = (600,) * 4, (1400,) * 4
SITES = sites(ATTENTION_SIZES, FFN_SIZES, heads=3, channels=56)
GROUPED = sites(ATTENTION_SIZES, FFN_SIZES, heads=9, kv_heads=3, channels=56)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _measured(seed: int = 0) -> MaskGradients:
    layer_scale = [10.0 ** (seed % 3 - layer) for layer in range(4)]
    x = [_random(50, 24, seed=layer + 100) for layer in range(4)]
    blocks = [torch.stack([part.T @ part for part in layer.split(8, 1)]) for layer in x]
    groups = torch.stack([torch.eye(7, dtype=torch.float64)] * 8)
    return MaskGradients(
        tuple(
            {
                ATTENTION: SiteGradients(_random(6, 24, seed=seed + layer) * scale, blocks[layer]),
                FFN: SiteGradients(_random(6, 56, seed=seed + 10 + layer) * scale, groups),
            }
            for layer, scale in enumerate(layer_scale)
        )
    )


def _sparsity(allocation: Allocation) -> float:
    return 1.0 - kept_share(SITES, allocation.keep)


def _fractions(allocation: Allocation) -> tuple[float, ...]:
    return allocation.fractions(ATTENTION) + allocation.fractions(FFN)


@settings(max_examples=40, deadline=None)
@given(sparsity=st.floats(0.0, 0.85), seed=st.integers(0, 50), rotate=st.booleans())
def test_mask_gradient_meets_the_budget_and_the_cap(sparsity, seed, rotate):
    options = AllocationOptions(pca_attention=rotate, pca_ffn=rotate)
    allocation = allocate_by_mask_gradient(_measured(seed), SITES, sparsity, options)
    assert _sparsity(allocation) == pytest.approx(sparsity, abs=1e-3)
    assert all(0.1 - 1e-9 <= f <= 1.0 for f in _fractions(allocation))


def test_more_important_layers_keep_more():
    allocation = allocate_by_mask_gradient(_measured(), SITES, 0.4, AllocationOptions())
    ffn = allocation.fractions(FFN)
    assert list(ffn) == sorted(ffn, reverse=True)
    assert ffn[0] > ffn[-1]


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


def test_exact_importance_is_that_of_the_rotated_rows_in_groups_of_sequences():
    grads, rotated, blocks = _random(5, 12), _random(5, 12, seed=2), torch.eye(6).double().repeat(2, 1, 1)
    site = SiteGradients(grads, blocks, rotated)
    exact = AllocationOptions(rotation="exact")
    torch.testing.assert_close(site.importance(True, exact), rotated.square().sum(0))
    torch.testing.assert_close(site.importance(False, exact), grads.square().sum(0))
    grouped = AllocationOptions(rotation="exact", gradient_group=2)
    pairs = rotated[0:2].sum(0).square() + rotated[2:4].sum(0).square() + rotated[4].square()
    torch.testing.assert_close(site.importance(True, grouped), pairs)


def test_a_mask_on_a_direction_has_the_gradient_q_t_m_q():
    x, g = _random(2, 9, 12), _random(2, 9, 12, seed=1)
    bases = torch.stack([torch.linalg.qr(_random(6, 6, seed=seed))[0] for seed in (2, 3)])
    found = rotated_mask_gradient(x, g, bases)
    for sequence in range(2):
        for block in range(2):
            part = slice(6 * block, 6 * block + 6)
            m = x[sequence, :, part].T @ g[sequence, :, part]
            wanted = torch.stack([q @ m @ q for q in bases[block].T])
            # The rows are float32.
            torch.testing.assert_close(found[sequence, part].double(), wanted, rtol=1e-5, atol=1e-5)


def test_ffn_share_shifts_the_loss_between_attention_and_ffn():
    allocation = allocate_uniform(None, SITES, 0.3, AllocationOptions(ffn_share=0.8))
    assert allocation.fractions(FFN)[0] == pytest.approx(1 - 0.24)
    assert allocation.fractions(ATTENTION)[0] < allocation.fractions(FFN)[0]
    assert _sparsity(allocation) == pytest.approx(0.3)


def test_zero_sparsity_keeps_everything():
    allocation = allocate_uniform(None, SITES, 0.0, AllocationOptions())
    assert set(_fractions(allocation)) == {1.0}


@pytest.mark.parametrize(("sparsity", "share"), [(0.88, 1.1), (0.5, 2.0), (0.5, 0.2), (0.9, 1.0), (0.3, 50.0)])
def test_a_share_beyond_the_cap_gives_the_rest_to_the_other_kind(sparsity, share):
    allocation = allocate_uniform(None, SITES, sparsity, AllocationOptions(ffn_share=share))
    assert _sparsity(allocation) == pytest.approx(sparsity)
    assert all(0.1 - 1e-9 <= f <= 1.0 + 1e-9 for f in _fractions(allocation))


def test_an_unreachable_budget_is_refused_with_numbers():
    with pytest.raises(BudgetError, match=r"0\.93.*90%"):
        count_units(SITES, 0.93, AllocationOptions())


@pytest.mark.parametrize(("sparsity", "heads"), [(0.0, 0), (0.2, 1), (0.3, 2), (0.5, 4)])
def test_units_of_grouped_queries_are_query_heads(sparsity, heads):
    options = AllocationOptions(budget_unit="units", ffn_share=1.0)
    units = count_units(GROUPED, sparsity, options)
    assert units.sparsity * (0.75 * 600 + 1400) == pytest.approx(sparsity * 2000)
    uniform = allocate_uniform(None, units.sites, units.sparsity, options)
    assert uniform.fractions(ATTENTION) == pytest.approx(
        uniform.fractions(FFN)
    )  # the same share of query heads as of channels
    # The nine query heads have three quarters of the weights; of what is not a whole head, the FFN loses more.
    weighed = units.to_weight_fractions(uniform)
    assert weighed.fractions(ATTENTION) == pytest.approx((1 - 0.75 * heads / 9,) * 4)
    assert _sparsity(weighed) == pytest.approx(sparsity)


def test_units_without_groups_are_heads_and_weights_are_left_alone():
    ungrouped = sites((630,) * 4, (1400,) * 4, heads=9, channels=56)
    alone = count_units(ungrouped, 0.3, AllocationOptions(budget_unit="units", ffn_share=1.0))
    assert alone.sites == ungrouped and alone.sparsity == 0.3
    uniform = allocate_uniform(None, alone.sites, alone.sparsity, AllocationOptions(ffn_share=1.0))
    assert alone.to_weight_fractions(uniform).fractions(ATTENTION) == pytest.approx((7 / 9,) * 4)
    weights = count_units(GROUPED, 0.3, AllocationOptions())
    assert weights.sites == GROUPED and weights.to_weight_fractions(uniform) == uniform


def test_an_unreachable_share_of_units_is_refused_with_the_sparsity_that_was_asked_for():
    with pytest.raises(BudgetError, match=r"0\.88.*90% of its units"):
        count_units(GROUPED, 0.88, AllocationOptions(budget_unit="units"))
