"""What is done to the output projection of a site after channels were removed: repairs from second moments only.

The output projection maps the kept inputs Z to the target Y; what removal alone leaves is Z W_0. A repair is a function
of the moments, W_0 [P, D] and the site's options that returns an `Output`; its row in strategies.py names the options
that it reads.

Shapes: N tokens, P kept inputs, D hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from intraslice.algebra.linalg import residual_energy, ridge_solve
from intraslice.methods.blockwise.options import AttentionOptions, FFNOptions
from intraslice.methods.blockwise.strategies import REPAIRS

RepairOptions = AttentionOptions | FFNOptions


@dataclass(frozen=True, kw_only=True)
class OutputMoments:
    """What is known of an output projection with inputs Z that should make Y: sums over tokens, float64.

    Y is taken without the bias of the projection, and with the factors that come after it. Tokens may count
    differently; then all sums are of products with the counts.

    Attributes:
        gram: Z^T Z, [P, P].
        cross: Z^T Y, [P, D].
        input_sum: sum of Z, [P].
        target_sum: sum of Y, [D].
        target_energy: ||Y||^2.
        num_tokens: N, or the sum of the counts.
        own_cross: Z^T of the dense site's own output on the pruned stream, [P, D]; None where that is Y, or not read.
        halves: the same sums over two halves of the sequences, for repairs that are fitted across them.
        read_energy: ||x_:,i||^2 of what the site itself reads, [D]; None unless a score needs it.
    """

    gram: Tensor
    cross: Tensor
    input_sum: Tensor
    target_sum: Tensor
    target_energy: float
    num_tokens: float
    own_cross: Tensor | None = None
    halves: tuple[OutputMoments, ...] = ()
    read_energy: Tensor | None = None

    def of_channels(self, channels: Tensor) -> OutputMoments:
        """Return the moments of some of the inputs."""
        return replace(
            self,
            gram=self.gram[channels][:, channels],
            cross=self.cross[channels],
            input_sum=self.input_sum[channels],
            own_cross=None if self.own_cross is None else self.own_cross[channels],
            halves=tuple(half.of_channels(channels) for half in self.halves),
        )

    def projected(self, projection_PQ: Tensor) -> OutputMoments:
        """Return the moments of the inputs Z projection."""
        return replace(
            self,
            gram=projection_PQ.T @ self.gram @ projection_PQ,
            cross=projection_PQ.T @ self.cross,
            input_sum=self.input_sum @ projection_PQ,
            own_cross=None if self.own_cross is None else projection_PQ.T @ self.own_cross,
            halves=tuple(half.projected(projection_PQ) for half in self.halves),
        )


def merged_halves(first: OutputMoments, second: OutputMoments) -> OutputMoments:
    """Return the moments of all sequences, from those of two halves."""

    def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else a + b

    return OutputMoments(
        gram=first.gram + second.gram,
        cross=first.cross + second.cross,
        input_sum=first.input_sum + second.input_sum,
        target_sum=first.target_sum + second.target_sum,
        target_energy=first.target_energy + second.target_energy,
        num_tokens=first.num_tokens + second.num_tokens,
        own_cross=both(first.own_cross, second.own_cross),
        halves=(first, second),
        read_energy=both(first.read_energy, second.read_energy),
    )


@dataclass(frozen=True)
class Output:
    """A repaired output projection: Y is approximated by Z weight + bias.

    Attributes:
        weight: [P, D].
        bias: [D], or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def relative_error(self, moments: OutputMoments) -> float:
        """Return ||Y - Z weight - bias||^2 / ||Y||^2."""
        error = residual_energy(moments.target_energy, moments.gram, moments.cross, self.weight)
        if self.bias is not None:
            missing = moments.target_sum - moments.input_sum @ self.weight
            error += float((self.bias * (moments.num_tokens * self.bias - 2.0 * missing)).sum())
        return max(error, 0.0) / max(moments.target_energy, 1e-30)


def nothing(moments: OutputMoments, removed_PD: Tensor, options: RepairOptions) -> Output:
    """Leave the output projection as removal alone leaves it."""
    return Output(removed_PD)


def ridge(moments: OutputMoments, removed_PD: Tensor, options: RepairOptions) -> Output:
    """Fit Y ~ Z W by ridge regression, pulled towards W_0 or towards zero; Paper: Eq. 6 and 8.

    The optimal-brain-surgeon update W H_:,S [H_SS]^-1 of SoBP, with H = X^T X + lambda I and the site's own output as
    the target, is this regression with shrink_to = "weights".

    Raises:
        NumericalError: the system cannot be solved.
    """
    prior = removed_PD if options.shrink_to == "weights" else None
    per_channel = options.damping_scale == "channel"
    return Output(ridge_solve(moments.gram, moments.cross, options.damping, prior, per_channel=per_channel))


DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Tried by `cross_fit`, for half of the tokens."""


def cross_fit(moments: OutputMoments, removed_PD: Tensor, options: RepairOptions) -> Output:
    """Fit the site's own output y and the drift m - y by two ridge regressions, and choose their dampings and a share.

    W = W_y(lambda_y) + alpha W_d(lambda_d), with W_y pulled towards W_0 or zero and W_d towards zero. Each half of the
    sequences is fitted, and judged by what the other half misses of the whole target m. For a pair of dampings that is
    quadratic in alpha, so that the best alpha is a quotient; it is kept in [0, drift_share]. The best dampings are then
    halved, because all sequences are twice as many, and all are fitted.

    Raises:
        NumericalError: a system cannot be solved.
    """
    count = len(DAMPINGS)
    # What the other half misses with W_y = W_y(i) and W_d = W_d(j): missed_i - 2 alpha linear_ij + alpha^2 energy_j.
    missed, energy = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    linear = torch.zeros(count, count, dtype=torch.float64)
    for half, other in (moments.halves, moments.halves[::-1]):
        fits = [_own_and_drift(half, removed_PD, damping, options) for damping in DAMPINGS]
        own_left = [other.cross - other.gram @ own for own, _ in fits]
        for i, (own, drift) in enumerate(fits):
            missed[i] -= ((other.cross + own_left[i]) * own).sum()
            energy[i] += (drift * (other.gram @ drift)).sum()
            linear[:, i] += torch.stack([(left * drift).sum() for left in own_left])
    share = (linear / energy.clamp_min(1e-300)).clamp(0.0, options.drift_share)
    error = missed[:, None] - 2.0 * share * linear + share.square() * energy
    best_own, best_drift = divmod(int(error.argmin()), len(DAMPINGS))
    own, drift = _own_and_drift(moments, removed_PD, DAMPINGS[best_own] / 2, options)
    if best_drift != best_own:
        _, drift = _own_and_drift(moments, removed_PD, DAMPINGS[best_drift] / 2, options)
    return Output(own + share[best_own, best_drift] * drift)


def _own_and_drift(
    moments: OutputMoments, removed_PD: Tensor, damping: float, options: RepairOptions
) -> tuple[Tensor, Tensor]:
    """Return the regressions of the own output and of the drift, [P, D] each."""
    own = moments.cross if moments.own_cross is None else moments.own_cross
    prior = removed_PD if options.shrink_to == "weights" else torch.zeros_like(removed_PD)
    solution = ridge_solve(
        moments.gram,
        torch.cat([own, moments.cross - own], 1),
        damping,
        torch.cat([prior, torch.zeros_like(prior)], 1),
        per_channel=options.damping_scale == "channel",
    )
    return solution[:, : own.shape[1]], solution[:, own.shape[1] :]


def mean_bias(moments: OutputMoments, removed_PD: Tensor, options: RepairOptions) -> Output:
    """Add the mean of what is missing as a bias, b = mean(Y) - mean(Z) W_0: FLAP."""
    return Output(removed_PD, (moments.target_sum - moments.input_sum @ removed_PD) / moments.num_tokens)


def affine_fit(moments: OutputMoments, removed_PD: Tensor, options: RepairOptions) -> Output:
    """Fit Y_:,j ~ a_j (Z W_0)_:,j + b_j for each output channel by least squares: SlimLLM.

    a_j = Cov(Z W_0, Y)_j / Var(Z W_0)_j; an output channel that does not vary keeps a_j = 1.
    """
    count = moments.num_tokens
    mean = moments.input_sum @ removed_PD / count
    target_mean = moments.target_sum / count
    variance = (removed_PD * (moments.gram @ removed_PD)).sum(0) / count - mean.square()
    covariance = (removed_PD * moments.cross).sum(0) / count - mean * target_mean
    varies = variance > 1e-12 * (variance + mean.square()).clamp_min(1e-30)
    scale = torch.where(varies, covariance / variance.where(varies, torch.ones(())), 1.0)
    return Output(removed_PD * scale, target_mean - scale * mean)


def repair_output(moments: OutputMoments, removed_PD: Tensor, options: RepairOptions) -> Output:
    """Return the output projection after the repair that `options.repair` names; strategies.REPAIRS has the rows.

    Args:
        moments: sums over the tokens.
        removed_PD: W_0.
        options: of the site.

    Raises:
        NumericalError: a system cannot be solved.
    """
    return REPAIRS[options.repair].load()(moments, removed_PD, options)
