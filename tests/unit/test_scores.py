"""Every score against its formula on explicit activations, float64."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from intraslice.methods.blockwise import scores

N, D, C, HEADS = 60, 7, 12, 4
WIDTH = C // HEADS


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def x() -> torch.Tensor:
    # Correlated channels whose means are not zero.
    return _random(N, C) @ _random(C, C, seed=1) + _random(C, seed=2)


@pytest.fixture
def w() -> torch.Tensor:
    return _random(D, C, seed=3)


def _pearson(a: torch.Tensor, b: torch.Tensor) -> float:
    """The sizes of the correlations of all output channels, added up."""
    columns = zip(a.T, b.T, strict=True)
    return sum(abs(float(torch.corrcoef(torch.stack(column))[0, 1])) for column in columns)


def _outputs_of(x: torch.Tensor, w: torch.Tensor, heads) -> torch.Tensor:
    columns = [head * WIDTH + i for head in heads for i in range(WIDTH)]
    return x[:, columns] @ w[:, columns].T


def test_channel_scores_are_their_formulas(x, w):
    energy = x.square().sum(0)
    for i in range(C):
        weight = w[:, i].norm()
        assert scores.energy_scores(energy, w)[i] == pytest.approx(float((x[:, i].norm() * weight) ** 2))
        wanda = [abs(float(w[j, i])) * float(x[:, i].norm()) for j in range(D)]
        assert scores.norm_scores(energy, w)[i] == pytest.approx(sum(wanda) / D)
        assert scores.magnitude_scores(energy)[i] == pytest.approx(float(x[:, i].norm()))
        fluctuation = scores.fluctuation_scores(energy, x.sum(0), N, w)[i]
        assert fluctuation == pytest.approx(float(x[:, i].var(correction=0) * weight**2))


def test_fluctuation_of_a_constant_channel_is_zero_however_large():
    x = torch.full((N, 1), 1e3, dtype=torch.float64)
    found = scores.fluctuation_scores(x.square().sum(0), x.sum(0), N, torch.ones(2, 1))
    assert 0 <= float(found) < 1e-6


def test_feature_scores_weigh_the_directions_in_which_the_output_varies(x, w):
    outputs = x @ w.T
    values, vectors = torch.linalg.eigh(torch.cov(outputs.T, correction=0))
    importance = torch.sigmoid(values / values.mean())
    found = scores.feature_scores(x.T @ x, x.sum(0), N, w)
    for i in range(C):
        explicit = sum((importance[k] * (vectors[:, k] @ w[:, i])) ** 2 for k in range(D)) ** 0.5
        assert found[i] == pytest.approx(float(x[:, i].norm() * explicit))


def test_the_feature_score_has_what_gate_and_up_read_and_keeps_the_lowest_percent():
    channels, read = 150, _random(N, 5, seed=5)
    gate, up = _random(channels, 5, seed=6), _random(channels, 5, seed=7)
    x, w = _random(N, channels, seed=8), _random(D, channels, seed=9)
    site = scores.ScoreInput(
        energy=x.square().sum(0),
        total=x.sum(0),
        moment=x.T @ x,
        num_tokens=N,
        weight=w,
        units=channels,
        removed=30,
        damping=0.1,
        read_energy=read.square().sum(0),
        reading=(gate, up),
    )
    plain = scores.feature_scores(x.T @ x, x.sum(0), N, w)
    for i in range(channels):
        for matrix in (gate, up):
            plain[i] += sum((float(matrix[i, j]) * float(read[:, j].norm())) ** 2 for j in range(5)) ** 0.5
    found = scores.feature(site)
    lowest = plain.argsort()[:2]  # round(0.01 * 150)
    assert torch.isinf(found[lowest]).all()
    others = plain.argsort()[2:]
    torch.testing.assert_close(found[others], plain[others])


def test_leverage_is_what_the_other_channels_cannot_say(x):
    """diag(G (G + lambda I)^-1) = 1 - lambda / (least squared norm of a damped combination that has the channel)."""
    moment, damping = x.T @ x, 0.05
    strength = damping * float(moment.diagonal().mean())
    found = scores.leverage_scores(moment, damping)
    for i in range(C):
        others = [j for j in range(C) if j != i]
        damped = moment[others][:, others] + strength * torch.eye(C - 1, dtype=torch.float64)
        left = moment[i, i] + strength - moment[i, others] @ torch.linalg.solve(damped, moment[others, i])
        assert found[i] == pytest.approx(1.0 - strength / float(left))


def test_head_scores_are_the_correlations_without_the_head(x, w):
    found = scores.HeadCorrelation(x.T @ x, x.sum(0), N, w, HEADS).scores()
    for head in range(HEADS):
        without = _outputs_of(x, w, [other for other in range(HEADS) if other != head])
        assert found[head] == pytest.approx(-_pearson(x @ w.T, without))


@pytest.mark.parametrize(("group", "groups"), [(1, "ragged"), (2, "ragged"), (2, "uniform")])
def test_swaps_raise_the_correlation_and_keep_the_cost(x, w, group, groups):
    correlation = scores.HeadCorrelation(x.T @ x, x.sum(0), N, w, HEADS)
    choices: dict[tuple[int, ...], float] = {
        heads: _pearson(x @ w.T, _outputs_of(x, w, heads))
        for heads in combinations(range(HEADS), 2)
        if group == 1 or groups == "ragged" or heads in ((0, 1), (2, 3), (0, 2), (0, 3), (1, 2), (1, 3))
    }
    for start, value in choices.items():
        found = correlation.swap(start, group, groups)
        assert choices[found] >= value - 1e-12
        assert len({head // group for head in found}) == len({head // group for head in start})
        if group == 1:  # every pair but one is a swap away from the best one, and that one is two
            assert choices[found] == pytest.approx(max(choices.values()))


@pytest.mark.parametrize("units", [C, HEADS])
def test_elimination_is_the_greedy_choice_of_the_least_error(x, w, units):
    """Each step removes the unit whose loss, made up for by all others, costs least under the damped second moment."""
    damping, width, steps = 0.1, C // units, units // 2
    moment = x.T @ x
    damped = moment + damping * moment.diagonal().mean() * torch.eye(C, dtype=torch.float64)

    def cost(kept: list[int]) -> float:
        channels = [unit * width + i for unit in kept for i in range(width)]
        missing = w.T.clone()
        missing[channels] -= torch.linalg.solve(damped[channels][:, channels], damped[channels] @ w.T)
        return float((missing * (damped @ missing)).sum())

    kept, order = list(range(units)), []
    for _ in range(steps):
        order.append(min(kept, key=lambda unit: cost([other for other in kept if other != unit])))
        kept.remove(order[-1])
    ranks = scores.elimination_ranks(moment, w, units, steps, damping)
    assert [ranks.tolist().index(step) for step in range(steps)] == order
    assert sorted(ranks.tolist())[steps:] == [float(steps)] * (units - steps)


def test_elimination_of_a_dead_block_is_by_weights():
    w = torch.diag(torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64))
    assert scores.elimination_ranks(torch.zeros(3, 3, dtype=torch.float64), w, 3, 2, 0.1).tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize("units", [C, HEADS])
def test_costs_and_updates_are_the_minimum_of_the_kronecker_factored_quadratic(x, w, units):
    """For each unit, of all changes d of the D C weights that take it out the least 1/2 d^T (G x H) d."""
    damping, width = 0.1, C // units
    moment, gradients = x.T @ x, _random(N, D, seed=4)
    g = gradients.T @ gradients
    hessian = torch.kron(g, moment + damping * moment.diagonal().mean() * torch.eye(C, dtype=torch.float64))
    costs = scores.removal_costs(moment, g, w, units, damping)
    for unit in range(units):
        gone = torch.zeros(C, dtype=torch.bool)
        gone[unit * width : (unit + 1) * width] = True
        fixed = gone.repeat(D)  # rows of W one after the other
        change = torch.zeros(D * C, dtype=torch.float64)
        change[fixed] = -w.flatten()[fixed]
        change[~fixed] = -torch.linalg.solve(hessian[~fixed][:, ~fixed], hessian[~fixed][:, fixed] @ change[fixed])
        assert costs[unit] == pytest.approx(float(0.5 * change @ hessian @ change))
        found = scores.without_channels(moment, w, gone, damping)
        torch.testing.assert_close(found, w + change.view(D, C))
        assert not found[:, gone].any()


def test_removing_several_units_is_one_elimination_of_all_their_channels(x, w):
    moment, gone = x.T @ x, torch.arange(C) % 3 == 0
    strength = 0.1 * moment.diagonal().mean() * torch.eye(C, dtype=torch.float64)
    inverse = torch.linalg.inv(moment + strength)
    expected = w - w[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    torch.testing.assert_close(scores.without_channels(moment, w, gone, 0.1), expected)


def test_what_is_gone_costs_nothing_and_dead_inputs_cost_their_weights(x, w):
    """Columns of zeros cost nothing to remove; where nothing is known of the inputs, larger weights cost more."""
    gone = torch.arange(C) < 2
    costs = scores.removal_costs(x.T @ x, torch.eye(D, dtype=torch.float64), w.masked_fill(gone, 0.0), C, 0.1)
    assert (costs[gone] == 0).all() and (costs[~gone] > 0).all()
    nothing = torch.zeros(C, C, dtype=torch.float64)
    costs = scores.removal_costs(nothing, torch.eye(D, dtype=torch.float64), w, C, 0.1)
    assert costs.argsort().tolist() == w.square().sum(0).argsort().tolist()
