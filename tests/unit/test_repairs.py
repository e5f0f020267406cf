"""Every repair against an explicit regression on the activations, float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from intraslice.methods.blockwise.options import FFNOptions
from intraslice.methods.blockwise.repairs import DAMPINGS, Output, OutputMoments, merged_halves, repair_output
from support.output_moments import moments_of

N, P, D = 80, 6, 5


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The block keeps the first P of 9 channels.
X = _random(N, 9) @ _random(9, 9, seed=1) + _random(9, seed=2)
W = _random(9, D, seed=3)
Z, Y, REMOVED = X[:, :P], X @ W, W[:P]
MOMENTS = moments_of(Z, Y)


def _repair(kind: Any, **changes: Any) -> Output:
    return repair_output(MOMENTS, REMOVED, FFNOptions(repair=kind, **changes))


def _error(output: Output) -> float:
    found = Z @ output.weight + (0.0 if output.bias is None else output.bias)
    return float((Y - found).square().sum() / Y.square().sum())


@pytest.mark.parametrize("kind", ["none", "bias", "affine", "ridge"])
def test_the_reported_error_is_that_of_the_outputs(kind):
    output = _repair(kind)
    assert output.relative_error(MOMENTS) == pytest.approx(_error(output), rel=1e-9)


def test_each_repair_lowers_the_error():
    errors = [_error(_repair(kind, damping=1e-6)) for kind in ("none", "bias", "affine")]
    assert errors == sorted(errors, reverse=True) and errors[2] < errors[1] < errors[0]


def test_the_bias_is_the_mean_of_what_was_dropped():
    output = _repair("bias")
    assert torch.equal(output.weight, REMOVED)
    assert output.bias is not None
    torch.testing.assert_close(output.bias, X[:, P:].mean(0) @ W[P:])


def test_the_affine_fit_is_a_least_squares_line_for_each_output_channel():
    output = _repair("affine")
    assert output.bias is not None
    for j in range(D):
        line = torch.stack([Z @ REMOVED[:, j], torch.ones(N, dtype=torch.float64)], 1)
        scale, offset = torch.linalg.lstsq(line, Y[:, j : j + 1]).solution.flatten()
        torch.testing.assert_close(output.weight[:, j], scale * REMOVED[:, j])
        torch.testing.assert_close(output.bias[j], offset)


def test_an_output_channel_that_does_not_vary_keeps_its_weights():
    removed = REMOVED.clone()
    removed[:, 0] = 0.0
    output = repair_output(MOMENTS, removed, FFNOptions(repair="affine"))
    assert output.bias is not None and torch.isfinite(output.weight).all()
    assert torch.equal(output.weight[:, 0], removed[:, 0])
    torch.testing.assert_close(output.bias[0], Y[:, 0].mean())


def test_ridge_towards_the_weights_is_the_optimal_brain_surgeon_update():
    """Channel by channel: W <- W - W_q H^-1_q,: / H^-1_qq, with H = X^T X + lambda I; SoBP."""
    damping = 0.05
    scale = MOMENTS.gram.diagonal().mean()
    hessian = X.T @ X + damping * scale * torch.eye(9, dtype=torch.float64)
    inverse, weight = torch.linalg.inv(hessian), W.clone()
    for q in range(P, 9):
        weight -= torch.outer(inverse[q] / inverse[q, q], weight[q])
        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        inverse[q, q] = 1.0  # gone; only its zero row is used from here on
        inverse[q, :q] = inverse[q, q + 1 :] = 0.0
    update = torch.linalg.solve(hessian[:P, :P], hessian[:P] @ W)
    torch.testing.assert_close(weight[:P], update)
    torch.testing.assert_close(_repair("ridge", damping=damping).weight, update)


def _halves(targets: torch.Tensor, own: torch.Tensor) -> OutputMoments:
    """Moments of the first and the second half of the tokens, with what the dense site itself makes of them."""
    parts = [
        replace(moments_of(Z[part], targets[part]), own_cross=Z[part].T @ own[part])
        for part in (slice(0, N // 2), slice(N // 2, N))
    ]
    return merged_halves(*parts)


def _brute_force(targets: torch.Tensor, own: torch.Tensor, most: float) -> torch.Tensor:
    """The same choice from explicit regressions and errors, alpha on a fine grid."""

    def fit(rows: slice, wanted: torch.Tensor, damping: float, prior: torch.Tensor) -> torch.Tensor:
        z = Z[rows]
        penalty = damping * (z.T @ z).diagonal().mean() * torch.eye(P, dtype=z.dtype)
        return prior + torch.linalg.solve(z.T @ z + penalty, z.T @ (wanted[rows] - z @ prior))

    drift, zero = targets - own, torch.zeros_like(REMOVED)
    first, second, everything = slice(0, N // 2), slice(N // 2, N), slice(0, N)
    best = None
    for own_damping in DAMPINGS:
        for drift_damping in DAMPINGS:
            left, explained = [], []
            for seen, judged in ((first, second), (second, first)):
                left.append(targets[judged] - Z[judged] @ fit(seen, own, own_damping, REMOVED))
                explained.append(Z[judged] @ fit(seen, drift, drift_damping, zero))
            for alpha in torch.linspace(0, most, 201, dtype=torch.float64):
                error = float((torch.cat(left) - alpha * torch.cat(explained)).square().sum())
                if best is None or error < best[0]:
                    best = (error, own_damping, drift_damping, alpha)
    assert best is not None
    _, own_damping, drift_damping, alpha = best
    return fit(everything, own, own_damping / 2, REMOVED) + alpha * fit(everything, drift, drift_damping / 2, zero)


@pytest.mark.parametrize(("noise", "most"), [(0.0, 1.0), (3.0, 1.0), (0.0, 0.4)])
def test_cross_fit_chooses_what_does_best_on_the_other_half(noise, most):
    drift = Z @ _random(P, D, seed=7) * 0.3 + noise * _random(N, D, seed=8)
    found = _cross_fit(Y + drift, Y, most)
    # The share of the brute force is the best of a grid of 201.
    torch.testing.assert_close(found, _brute_force(Y + drift, Y, most), rtol=1e-2, atol=5e-3)


def _cross_fit(targets: torch.Tensor, own: torch.Tensor, most: float) -> torch.Tensor:
    options = FFNOptions(repair="cross_fit", drift_share=most)
    return repair_output(_halves(targets, own), REMOVED, options).weight


def test_cross_fit_leaves_out_a_drift_that_is_noise():
    noise = 30.0 * _random(N, D, seed=9)
    own = _cross_fit(Y, Y, 1.0)
    with_noise, all_of_it = _cross_fit(Y + noise, Y, 1.0), _repair_of(Y + noise)
    assert (with_noise - own).norm() < 0.5 * (all_of_it - own).norm()


def _repair_of(targets: torch.Tensor) -> torch.Tensor:
    return repair_output(moments_of(Z, targets), REMOVED, FFNOptions(damping=0.01)).weight


def test_cross_fit_of_the_own_output_has_no_drift():
    moments = replace(_halves(Y, Y), own_cross=None)
    moments = replace(moments, halves=tuple(replace(half, own_cross=None) for half in moments.halves))
    found = repair_output(moments, REMOVED, FFNOptions(repair="cross_fit")).weight
    torch.testing.assert_close(found, _cross_fit(Y, Y, 1.0))
