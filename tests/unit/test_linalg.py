"""Each solver against the plain definition, in float64."""

from __future__ import annotations

import pytest
import torch

from intraslice.algebra.linalg import (
    eigh_descending,
    low_rank_product,
    low_rank_scores,
    residual_energy,
    ridge_solve,
    rotate_blocks,
)
from intraslice.algebra.scores import pair_energy_scores
from intraslice.errors import NumericalError


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_eigh_descending_orders_and_reconstructs():
    x = _random(50, 6)
    moment = x.T @ x
    values, vectors = eigh_descending(moment)
    assert (values.diff() <= 0).all()
    assert torch.allclose(vectors @ torch.diag(values) @ vectors.T, moment, atol=1e-10)


def test_ridge_equals_augmented_least_squares():
    z, y, damping = _random(40, 5), _random(40, 7, seed=1), 0.03
    gram = z.T @ z
    scale = damping * gram.diagonal().mean()
    # Ridge is least squares with sqrt(lambda) I stacked below the data and zeros as targets.
    stacked = torch.cat([z, scale.sqrt() * torch.eye(5, dtype=z.dtype)])
    expected = torch.linalg.lstsq(stacked, torch.cat([y, torch.zeros(5, 7, dtype=y.dtype)])).solution
    assert torch.allclose(ridge_solve(gram, z.T @ y, damping), expected, atol=1e-10)


def test_ridge_towards_a_prior_is_augmented_least_squares():
    z, y, prior, damping = _random(40, 5), _random(40, 7, seed=1), _random(5, 7, seed=2), 0.3
    gram = z.T @ z
    root = (damping * gram.diagonal().mean()).sqrt()
    stacked = torch.cat([z, root * torch.eye(5, dtype=z.dtype)])
    expected = torch.linalg.lstsq(stacked, torch.cat([y, root * prior])).solution
    assert torch.allclose(ridge_solve(gram, z.T @ y, damping, prior), expected, atol=1e-10)
    assert torch.allclose(ridge_solve(gram, gram @ prior, damping, prior), prior, atol=1e-12)


def test_ridge_per_channel_is_scaled_augmented_least_squares():
    z, y, prior, damping = _random(40, 5), _random(40, 7, seed=1), _random(5, 7, seed=2), 0.3
    z *= torch.tensor([100.0, 1.0, 1.0, 0.5, 1e-3], dtype=z.dtype)
    gram = z.T @ z
    energy = gram.diagonal().clamp_min(1e-3 * gram.diagonal().mean())
    root = torch.diag((damping * energy).sqrt())
    stacked = torch.cat([z, root])
    expected = torch.linalg.lstsq(stacked, torch.cat([y, root @ prior])).solution
    found = ridge_solve(gram, z.T @ y, damping, prior, per_channel=True)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_ridge_per_channel_does_not_depend_on_the_scale_of_a_channel():
    z, y, scale = _random(40, 5), _random(40, 7, seed=1), torch.tensor([9.0, 1, 1, 1, 0.5], dtype=torch.float64)
    plain = ridge_solve(z.T @ z, z.T @ y, 0.3, per_channel=True)
    scaled = ridge_solve((z * scale).T @ (z * scale), (z * scale).T @ y, 0.3, per_channel=True)
    torch.testing.assert_close(scaled * scale[:, None], plain)


def test_ridge_retries_a_singular_system_with_more_damping():
    z = _random(40, 3)
    z = torch.cat([z, z], dim=1)  # rank 3 of 6
    solution = ridge_solve(z.T @ z, z.T @ z, 0.0)
    assert torch.isfinite(solution).all()
    assert torch.allclose(z @ solution, z, atol=1e-2)


def test_ridge_of_dead_channels_is_zero():
    assert ridge_solve(torch.zeros(3, 3).double(), torch.zeros(3, 2).double(), 0.01).abs().max() == 0


def test_ridge_refuses_nan():
    gram = torch.eye(3, dtype=torch.float64)
    with pytest.raises(NumericalError, match="NaN"):
        ridge_solve(gram * float("nan"), gram, 0.01)


def test_residual_energy_is_the_explicit_residual():
    z, y, w = _random(40, 5), _random(40, 7, seed=1), _random(5, 7, seed=2)
    explicit = (y - z @ w).square().sum()
    energy = residual_energy(float(y.square().sum()), z.T @ z, z.T @ y, w)
    assert energy == pytest.approx(float(explicit), rel=1e-10)


def test_low_rank_scores_is_the_truncated_svd_of_all_scores():
    query, key, rank = _random(30, 8), _random(40, 8, seed=1), 3
    a, b = low_rank_scores(query.T @ query, key.T @ key, rank)
    left, singular, right = torch.linalg.svd(query @ key.T)
    best = left[:, :rank] @ torch.diag(singular[:rank]) @ right[:rank]
    assert torch.allclose((query @ a) @ (key @ b).T, best, atol=1e-5)


def test_low_rank_scores_at_full_rank_changes_nothing():
    query, key = _random(30, 4), _random(40, 4, seed=1)
    a, b = low_rank_scores(query.T @ query, key.T @ key, 4)
    assert torch.allclose((query @ a) @ (key @ b).T, query @ key.T, atol=1e-6)


def test_low_rank_product_is_the_truncated_svd_of_values_times_output_weights():
    """Also where several query heads read the same values: their weights stand side by side."""
    values, weights = _random(40, 6), torch.cat([_random(9, 6, seed=1), _random(9, 6, seed=2)])
    a, b = low_rank_product(values.T @ values, weights.T @ weights, 3)
    u, s, v = torch.linalg.svd(values @ weights.T, full_matrices=False)
    torch.testing.assert_close(values @ a @ b @ weights.T, (u[:, :3] * s[:3]) @ v[:3], atol=1e-5, rtol=0)
    torch.testing.assert_close(b @ a, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)


def test_pair_energies_are_products_of_norms():
    query, key = _random(20, 4, 6), _random(20, 2, 6, seed=1)  # [N, H, d], [N, K, d]
    pairs = torch.tensor([[0, 3], [1, 4], [2, 5]])
    found = pair_energy_scores(query.square().sum(0), key.square().sum(0), 20, pairs)
    for head in range(4):
        for number, pair in enumerate(pairs.tolist()):
            expected = query[:, head, pair].norm() * key[:, head // 2, pair].norm() / 20
            assert found[head, number] == pytest.approx(float(expected))


def test_rotate_blocks_is_a_block_diagonal_product():
    vectors, blocks = _random(5, 6), _random(2, 3, 3, seed=1)
    assert torch.allclose(rotate_blocks(vectors, blocks), vectors @ torch.block_diag(*blocks), atol=1e-12)
