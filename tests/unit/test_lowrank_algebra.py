"""Factors and rotations against their defining formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intraslice.errors import BudgetError, NumericalError
from intraslice.methods.slicegpt.algebra import leading_directions, rotate_rows, slice_width
from intraslice.methods.svd_llm.algebra import factor_weight, plan_ranks, square_root

LAYER = {"q": (64, 64), "k": (32, 64), "up": (160, 64), "down": (64, 160)}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(tokens: int, channels: int) -> Tensor:
    return gaussian(tokens, channels) @ gaussian(channels, channels, seed=1)


@pytest.mark.parametrize("rows,columns", [(6, 9), (9, 6)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_factors_are_the_truncated_svd_of_the_whitened_weight(rows, columns, rank):
    weight, inputs = gaussian(rows, columns, seed=2), correlated(40, columns)
    moment = inputs.T @ inputs
    first, second = factor_weight(weight, square_root(moment), rank)
    assert first.shape == (rank, columns) and second.shape == (rows, rank)
    # The paper's own steps: S of the Cholesky factorisation, U_r Sigma_r V_r^T S^-1.
    cholesky = torch.linalg.cholesky(moment)
    left, singular, right_t = torch.linalg.svd(weight @ cholesky)
    kept = left[:, :rank] @ torch.diag(singular[:rank]) @ right_t[:rank] @ torch.linalg.inv(cholesky)
    assert torch.allclose(second @ first, kept, atol=1e-9)
    loss = (inputs @ (weight - second @ first).T).norm()
    assert loss == pytest.approx(float(singular[rank:].norm()), abs=1e-8)


def test_no_other_weight_of_that_rank_loses_less():
    weight, inputs = gaussian(6, 8, seed=2), correlated(40, 8)
    first, second = factor_weight(weight, square_root(inputs.T @ inputs), 3)
    loss = (inputs @ (weight - second @ first).T).norm()
    for seed in range(50):
        # Near ones, and fits of the other factor to random ones.
        near = (second + 0.01 * gaussian(6, 3, seed=seed)) @ (first + 0.01 * gaussian(3, 8, seed=seed + 100))
        basis = torch.linalg.qr(gaussian(6, 3, seed=seed)).Q
        for other in (near, basis @ basis.T @ weight):
            assert (inputs @ (weight - other).T).norm() > loss


def test_inputs_without_full_rank_are_no_trouble():
    weight, inputs = gaussian(6, 8, seed=2), gaussian(3, 8)
    first, second = factor_weight(weight, square_root(inputs.T @ inputs), 3)
    assert torch.allclose(inputs @ (second @ first).T, inputs @ weight.T, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.5, 0.8])
def test_ranks_meet_the_budget_with_about_the_same_share_everywhere(sparsity):
    plan = plan_ranks([LAYER] * 5, sparsity)
    total = 5 * sum(rows * columns for rows, columns in LAYER.values())
    kept = 0
    for ranks in plan:
        for path, (rows, columns) in LAYER.items():
            cost = (
                dict(ranks).get(path, min(rows, columns)) * (rows + columns) if path in dict(ranks) else rows * columns
            )
            assert cost <= rows * columns
            kept += cost
            assert abs(cost / (rows * columns) - (1 - sparsity)) < 0.35
    assert abs(1 - kept / total - sparsity) <= 0.005


def test_at_sparsity_zero_every_weight_stays():
    assert plan_ranks([LAYER] * 2, 0.0) == [(), ()]


def test_weights_too_small_for_the_budget_are_refused():
    with pytest.raises(BudgetError, match="reach only"):
        plan_ranks([{"q": (4, 4)}], 0.4)


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.3, 0.5, 0.7])
def test_the_slice_width_pays_for_the_matrices_on_the_residual_connections(sparsity):
    layers, per_channel, channels, hidden_size = 30, 6144, 1536, 576
    width = slice_width(layers, per_channel, channels, hidden_size, sparsity)
    kept = layers * (per_channel * width + 2 * width**2)
    # The last layer writes the whole stream.
    kept += (hidden_size - width) * (channels + width)
    assert abs(1 - kept / (layers * per_channel * hidden_size) - sparsity) <= 0.005
    assert width < (1 - sparsity) * hidden_size


def test_leading_directions_lose_the_least_energy():
    inputs = correlated(50, 10)
    basis, lost = leading_directions(inputs.T @ inputs, 4)
    assert torch.allclose(basis.T @ basis, torch.eye(4, dtype=torch.float64), atol=1e-10)
    deleted = (inputs - inputs @ basis @ basis.T).square().sum()
    assert lost == pytest.approx(float(deleted / inputs.square().sum()))
    for seed in range(20):
        other = torch.linalg.qr(gaussian(10, 4, seed=seed)).Q
        assert (inputs - inputs @ other @ other.T).square().sum() > deleted
    with pytest.raises(NumericalError, match="NaN"):
        leading_directions(torch.full((3, 3), float("nan"), dtype=torch.float64), 2)


def test_a_rotated_weight_behind_the_sliced_norm_reads_what_the_dense_one_reads_of_the_projection():
    hidden, eps = correlated(20, 12), 1e-3
    weight, norm = gaussian(5, 12, seed=3), 1 + 0.3 * gaussian(12, seed=4)
    basis, _ = leading_directions(hidden.T @ hidden, 7)
    projected = hidden @ basis @ basis.T
    dense = torch.nn.functional.rms_norm(projected, (12,), norm, eps=eps) @ weight.T
    sliced = torch.nn.functional.rms_norm(hidden @ basis, (7,), eps=eps * 12 / 7) @ rotate_rows(weight, basis, norm).T
    assert torch.allclose(sliced, dense, atol=1e-10)
