"""Compression of one block against brute force on explicit activations, float64."""

from __future__ import annotations

import pytest
import torch

from intraslice.algebra.linalg import ridge_solve
from intraslice.algebra.scores import rope_pair_scores
from intraslice.layers.weights import AttentionWeights, ValueEdit, fuse_qk, fuse_value
from intraslice.methods.blockwise.channels import channel_scores, own_output, select_channels, solve_down
from intraslice.methods.blockwise.heads import (
    AttentionStats,
    choose_qk,
    head_scores,
    solve_value,
)
from intraslice.methods.blockwise.iter_pca import iterate_pca, pseudo_inverse
from intraslice.methods.blockwise.options import AttentionOptions, FFNOptions
from intraslice.methods.blockwise.repairs import OutputMoments
from intraslice.runtime.modeling_intraslice import pair_channels
from support.output_moments import moments_of

D, H, K, d, N = 24, 4, 2, 8, 200


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _correlated(tokens: int, channels: int, seed: int) -> torch.Tensor:
    return _random(tokens, channels, seed=seed) @ (_random(channels, channels, seed=seed + 1) * 0.5)


def _block(act: torch.Tensor, down: torch.Tensor) -> OutputMoments:
    return own_output(moments_of(act, act.new_zeros(len(act), len(down))), down)


def _stats_of_context(x: torch.Tensor) -> AttentionStats:
    """Statistics in which only the context counts."""
    heads = x.view(len(x), H, d)
    nothing = torch.zeros(H, d, dtype=torch.float64)
    return AttentionStats(
        context=torch.einsum("nhc,nhe->hce", heads, heads),
        context_sum=x.sum(0),
        context_full=x.T @ x,
        value_energy=nothing,
        query=nothing,
        key=nothing,
        key_sum=nothing,
        query_abs=nothing,
        key_abs=nothing,
        query_square=nothing,
        key_square=nothing,
        num_tokens=len(x),
    )


def test_head_scores_is_equation_2():
    x, w = _random(N, H * d), _random(D, H * d, seed=1)
    scores = head_scores(_stats_of_context(x), w, AttentionOptions())
    for h in range(H):
        explicit = sum(x[:, i].square().sum() * w[:, i].square().sum() for i in range(h * d, (h + 1) * d))
        assert float(scores[h]) == pytest.approx(float(explicit), rel=1e-12)


def test_rope_pair_scores_is_the_mean_of_all_products():
    query, key = _random(10, H, d), _random(12, K, d, seed=1)
    scores = rope_pair_scores(query.abs().sum(0) / 10, key.abs().sum(0) / 12, 1, pair_channels(d, d))
    for h in range(H):
        products = (query[:, None, h] * key[None, :, h // 2]).abs().mean((0, 1))
        for pair in range(d // 2):
            assert float(scores[h, pair]) == pytest.approx(float(products[pair] + products[pair + d // 2]))


def test_solve_value_is_pca_and_ridge_of_explicit_activations():
    per_kv, p = (2, 1), 5
    x = _correlated(N, 3 * d, seed=3)
    target = x @ _random(3 * d, D, seed=5) + 0.1 * _random(N, D, seed=6)
    moments = moments_of(x, target)
    edit, error = solve_value(
        torch.zeros(D, 3 * d), per_kv, p, moments, AttentionOptions(damping=0.01, shrink_to="zero")
    )
    heads = [x[:, h * d : (h + 1) * d] for h in range(3)]
    projected = []
    for kv, members in enumerate(((0, 1), (2,))):
        stacked = torch.cat([heads[h] for h in members])
        top = torch.linalg.svd(stacked, full_matrices=False).Vh[:p].T
        ours = edit.v_basis[kv]
        assert torch.allclose(ours @ ours.T, top @ top.T, atol=1e-8)  # the same subspace
        projected += [heads[h] @ ours for h in members]
    z = torch.cat(projected, 1)
    expected = ridge_solve(z.T @ z, z.T @ target, 0.01).T
    assert torch.allclose(edit.o_weight, expected, atol=1e-9)
    explicit = (target - z @ edit.o_weight.T).square().sum() / target.square().sum()
    assert error == pytest.approx(float(explicit), rel=1e-8)


def test_solve_value_without_reconstruction_only_projects():
    x, o = _correlated(N, 2 * d, seed=3), _random(D, 2 * d, seed=4)
    target = x @ o.T
    moments = moments_of(x, target)
    plain, plain_error = solve_value(o, (1, 1), 6, moments, AttentionOptions(repair="none"))
    assert torch.allclose(plain.o_weight, o @ torch.block_diag(*plain.v_basis))
    _, ridge_error = solve_value(o, (1, 1), 6, moments, AttentionOptions(damping=1e-9))
    assert ridge_error <= plain_error + 1e-12


def _weights() -> AttentionWeights:
    return AttentionWeights(
        q=_random(H, d, D, seed=1),
        k=_random(K, d, D, seed=2),
        v=_random(K, d, D, seed=3),
        o=_random(D, H * d, seed=4),
        q_bias=_random(H, d, seed=5),
        k_bias=_random(K, d, seed=6),
        v_bias=_random(K, d, seed=7),
    )


def _stats(weights: AttentionWeights, x: torch.Tensor) -> AttentionStats:
    query = torch.einsum("nD,hdD->nhd", x, weights.q) + weights.q_bias
    key = torch.einsum("nD,kdD->nkd", x, weights.k) + weights.k_bias
    value = (torch.einsum("nD,kdD->nkd", x, weights.v) + weights.v_bias).repeat_interleave(H // K, 1)

    def second(t: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nhc,nhe->hce", t, t)

    return AttentionStats(
        context=second(value),
        context_sum=value.sum(0).flatten(),
        context_full=None,
        value_energy=value[:, :: H // K].square().sum(0),
        query=second(query),
        key=second(key),
        key_sum=key.sum(0),
        query_abs=query.abs().sum(0),
        key_abs=key.abs().sum(0),
        query_square=query.square().sum(0),
        key_square=key.square().sum(0),
        num_tokens=len(x),
    )


@pytest.mark.parametrize("rope", [True, False])
def test_choose_qk_spends_the_budget_and_fuses_to_the_promised_shapes(rope):
    weights, x = _weights(), _random(N, D)
    pairs = pair_channels(d, d) if rope else None
    dense = 2 * D * d * (H + K)
    for share in (1.0, 0.8, 0.6, 0.4):
        options = AttentionOptions(head_multiple=2)
        edit = choose_qk(weights, _stats(weights, x), share * dense, options, pairs)
        fused, per_kv = fuse_qk(weights, edit, pairs)
        units = len(edit.heads) + len(per_kv)
        cost = 2 * D * units * edit.width
        full = edit.width == d
        assert abs(cost - share * dense) <= 2 * D * units or (full and cost < share * dense)  # half a step
        assert fused.q.shape == (len(edit.heads), edit.width, D)
        assert fused.k.shape == (len(per_kv), edit.width, D)
        assert fused.v.shape == (len(per_kv), d, D)
        assert fused.o.shape == (D, len(edit.heads) * d)
        assert fused.k_bias is not None and fused.k_bias.shape == (len(per_kv), edit.width)


def test_dense_qk_bases_keep_the_softmax_of_rank_deficient_scores():
    weights = _weights()
    # Queries that live in 4 of 8 dimensions: rank 4 is enough for exact scores.
    flat = torch.zeros_like(weights.q)
    flat[:, :4] = weights.q[:, :4]
    rotation = torch.linalg.qr(_random(d, d, seed=9)).Q
    weights = AttentionWeights(
        q=rotation @ flat, k=weights.k, v=weights.v, o=weights.o, k_bias=weights.k_bias, v_bias=weights.v_bias
    )
    x = _random(N, D)
    stats = _stats(AttentionWeights(**{**weights.__dict__, "q_bias": torch.zeros(H, d).double()}), x)
    budget = D * (H + K) * 2 * 6
    options = AttentionOptions(head_multiple=2, min_head_fraction=0.0)
    edit = choose_qk(weights, stats, budget, options, None)
    assert 4 <= edit.width < d
    fused, _ = fuse_qk(weights, edit, None)
    for position, head in enumerate(edit.heads):
        kv = sorted({h // 2 for h in edit.heads}).index(head // 2)
        dense = (x @ weights.q[head].T) @ (x @ weights.k[head // 2].T + weights.k_bias[head // 2]).T
        pruned = (x @ fused.q[position].T) @ (x @ fused.k[kv].T + fused.k_bias[kv]).T
        dense, pruned = (scores - scores.mean(1, keepdim=True) for scores in (dense, pruned))
        assert torch.allclose(dense.softmax(-1), pruned.softmax(-1), atol=1e-4)


def test_fuse_value_multiplies_the_context_by_the_basis():
    weights = _weights()
    edit = choose_qk(weights, _stats(weights, _random(N, D)), 0.7 * 2 * D * d * (H + K), AttentionOptions(), None)
    fused, per_kv = fuse_qk(weights, edit, None)
    basis = torch.linalg.qr(_random(len(per_kv), d, d, seed=8)).Q[:, :, :5]
    final = fuse_value(fused, ValueEdit(v_basis=basis, o_weight=torch.zeros(D, 5 * len(edit.heads)).double()))
    x = _random(7, D)
    assert fused.v_bias is not None and final.v_bias is not None
    dense = torch.einsum("nD,kdD->nkd", x, fused.v) + fused.v_bias
    assert torch.allclose(
        torch.einsum("nD,kpD->nkp", x, final.v) + final.v_bias, torch.einsum("nkd,kdp->nkp", dense, basis)
    )


def test_ffn_selection_and_ridge_equal_explicit_regression():
    act, down = _correlated(N, 16, seed=0), _random(D, 16, seed=2)
    moments = _block(act, down)
    scores = channel_scores(moments, down, 10, FFNOptions())
    explicit = act.square().sum(0) * down.square().sum(0)
    assert torch.allclose(scores, explicit)
    channels = select_channels(moments, down, 10, FFNOptions())
    assert set(channels.tolist()) == set(explicit.argsort(descending=True)[:10].tolist())
    edit, error = solve_down(moments, down, channels, FFNOptions(damping=0.01, shrink_to="zero"))
    target, kept = act @ down.T, act[:, channels]
    assert torch.allclose(edit.down_weight, ridge_solve(kept.T @ kept, kept.T @ target, 0.01).T, atol=1e-9)
    residual = (target - kept @ edit.down_weight.T).square().sum() / target.square().sum()
    assert error == pytest.approx(float(residual), rel=1e-8)
    _, plain_error = solve_down(moments, down, channels, FFNOptions(repair="none"))
    assert error <= plain_error


def test_ffn_against_another_target_is_the_regression_on_that_target():
    act, down = _correlated(N, 16, seed=0), _random(D, 16, seed=2)
    target = act @ down.T + _random(N, D, seed=3)
    energy = float(target.square().sum())
    moments = moments_of(act, target)
    channels = torch.arange(3, 13)
    edit, error = solve_down(moments, down, channels, FFNOptions(damping=0.1))
    kept = act[:, channels]
    expected = ridge_solve(kept.T @ kept, kept.T @ target, 0.1, down[:, channels].T).T
    assert torch.allclose(edit.down_weight, expected, atol=1e-9)
    assert error == pytest.approx(float((target - kept @ edit.down_weight.T).square().sum()) / energy, rel=1e-8)


def test_keeping_all_channels_changes_nothing():
    act, down = _correlated(N, 16, seed=0), _random(D, 16, seed=2)
    edit, error = solve_down(_block(act, down), down, torch.arange(16), FFNOptions())
    assert torch.equal(edit.down_weight, down)
    assert error == pytest.approx(0.0, abs=1e-12)


def test_pseudo_inverse():
    recon = _random(4, 9)
    assert torch.allclose(pseudo_inverse(recon), torch.linalg.pinv(recon), atol=2e-2)
    assert torch.allclose(recon @ pseudo_inverse(recon), torch.eye(4).double(), atol=2e-2)


class _Replay:
    activation = staticmethod(torch.nn.functional.silu)

    def __init__(self, up: torch.Tensor, gate: torch.Tensor | None, down: torch.Tensor) -> None:
        self._up, self._gate, self._down = up, gate, down

    def __iter__(self):
        for part in range(0, len(self._up), 50):
            rows = slice(part, part + 50)
            up, gate = self._up[rows], None if self._gate is None else self._gate[rows]
            act = self.activation(up) if gate is None else self.activation(gate) * up
            yield up, gate, act @ self._down.T


@pytest.mark.parametrize("gated", [True, False])
def test_iterate_pca_lowers_the_error_and_reports_it_truly(gated):
    # Channels that share a few directions: a dense map can use what a selection must drop.
    basis = _random(6, 32, seed=4)
    up = _random(400, 6) @ basis + 0.05 * _random(400, 32, seed=1)
    gate = _random(400, 6, seed=2) @ basis + 0.05 * _random(400, 32, seed=3) if gated else None
    replay = _Replay(up, gate, _random(D, 32, seed=7))
    act = replay.activation(up) if gate is None else replay.activation(gate) * up
    down = _random(D, 32, seed=7)
    moments = _block(act, down)
    options = FFNOptions(iter_pca_rounds=2, iter_pca_steps=40, iter_pca_lr=1e-2, damping=1e-4)
    start, start_error = solve_down(moments, down, select_channels(moments, down, 12, options), options)
    edit, error = iterate_pca(replay, moments, start, start_error, options)
    assert error < (0.999 if gated else 0.95) * start_error
    assert edit.channels is None and edit.up_map is not None
    compressed = (
        replay.activation(up @ edit.up_map)
        if gate is None
        else (replay.activation(gate @ edit.gate_map) * (up @ edit.up_map))
    )
    target = act @ down.T
    explicit = (target - compressed @ edit.down_weight.T).square().sum() / target.square().sum()
    assert error == pytest.approx(float(explicit), rel=1e-6)


def test_a_step_of_several_batches_sees_their_mean():
    """Three times the same batch in a step are one batch in a step; and slices may halve their rate."""
    up = _random(50, 8)
    down = _random(D, 8, seed=1)
    moments = _block(_Replay.activation(up), down)

    def error_of(**options) -> float:
        chosen = FFNOptions(iter_pca_lr=1e-2, iter_pca_steps=6, iter_pca_rounds=1, damping=1e-4, **options)
        start, start_error = solve_down(moments, down, select_channels(moments, down, 5, chosen), chosen)
        return iterate_pca(_Replay(up, None, down), moments, start, start_error, chosen)[1]

    plain = error_of()
    assert error_of(iter_pca_batches=3) == pytest.approx(plain, rel=1e-9)
    assert error_of(iter_pca_decay="halving") != pytest.approx(plain, rel=1e-6)
    # One slice has no other to be slower than.
    whole = error_of(iter_pca_slice=8)
    assert error_of(iter_pca_slice=8, iter_pca_decay="halving") == whole


def test_iterate_pca_never_returns_something_worse():
    act = _random(100, 8)
    replay = _Replay(act, None, _random(D, 8, seed=1))
    dense = replay.activation(act)
    down = _random(D, 8, seed=1)
    moments = _block(dense, down)
    options = FFNOptions(iter_pca_lr=50.0, iter_pca_steps=3)  # a step size that destroys the maps
    start, start_error = solve_down(moments, down, select_channels(moments, down, 6, options), options)
    edit, error = iterate_pca(replay, moments, start, start_error, options)
    assert edit is start and error == start_error
