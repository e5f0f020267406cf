"""What a channel or a head is worth; every method's rule is one short function of second moments.

Scores are compared within one site only, so constant factors are left out. The functions that strategies.py names take
a `ScoreInput`; they return one number per unit (head or FFN channel), or one per channel, which are then added up.

Shapes: N tokens, D hidden_size, C channels of the input of an output projection, H heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intraslice.algebra.linalg import damped_inverse, decomposing, eigh_descending, ridge_solve, unit_blocks
from intraslice.algebra.selection import heads_per_kv, kept_kv_heads


@dataclass(frozen=True, kw_only=True)
class ScoreInput:
    """What is known of a site when its units are ranked: sums over tokens of the input X of its output projection.

    Attributes:
        energy: ||X_:,i||^2, [C].
        total: sum of X_:,i, [C].
        moment: X^T X, [C, C]; None for attention unless the score's row needs it.
        num_tokens: N.
        weight: of the output projection, [D, C].
        units: number of units of equally many neighboring channels: H heads, or C channels.
        removed: how many units go at most.
        damping: obs_damping of the site.
        read_energy: ||x_:,i||^2 of what an FFN itself reads, [D]; None unless the score's row needs it.
        reading: weights of up and gate, [C, D] each.
        measured: scores of the units that were measured before the first layer changed, [units]; None where none were.
    """

    energy: Tensor
    total: Tensor
    moment: Tensor | None
    num_tokens: float
    weight: Tensor
    units: int
    removed: int
    damping: float
    read_energy: Tensor | None = None
    reading: tuple[Tensor, ...] = ()
    measured: Tensor | None = None

    @property
    def full_moment(self) -> Tensor:
        """X^T X of a score whose row needs it."""
        assert self.moment is not None, "the score's row must say needs_full_moment"
        return self.moment


def unit_scores(scores: Tensor, units: int) -> Tensor:
    """Return one score per unit, [units], of scores per unit or per channel."""
    return scores if len(scores) == units else scores.view(units, -1).sum(1)


def energy(site: ScoreInput) -> Tensor:
    """Return `energy_scores`, [C]."""
    return energy_scores(site.energy, site.weight)


def norm(site: ScoreInput) -> Tensor:
    """Return `norm_scores`, [C]."""
    return norm_scores(site.energy, site.weight)


def magnitude(site: ScoreInput) -> Tensor:
    """Return `magnitude_scores`, [C]."""
    return magnitude_scores(site.energy)


def fluctuation(site: ScoreInput) -> Tensor:
    """Return `fluctuation_scores`, [C]."""
    return fluctuation_scores(site.energy, site.total, site.num_tokens, site.weight)


def squared_fluctuation(site: ScoreInput) -> Tensor:
    """Return squared `fluctuation_scores`, [C], as FLAP allocates: a channel that varies much keeps its head."""
    return fluctuation(site).square()


def feature(site: ScoreInput) -> Tensor:
    """Return `feature_scores` plus `reading_scores`, [C], of which the lowest percent counts as the highest: SlimLLM.

    The published code keeps the round(0.01 F) channels of the lowest scores as well.
    """
    scores = feature_scores(site.full_moment, site.total, site.num_tokens, site.weight)
    if site.read_energy is not None:
        scores = scores + reading_scores(site.read_energy, site.reading)
    lowest = scores.argsort(stable=True)[: round(0.01 * len(scores))]
    return scores.index_fill(0, lowest, torch.inf)


def pearson(site: ScoreInput) -> Tensor:
    """Return the scores of `HeadCorrelation`, [H]."""
    return _correlation(site).scores()


def swap_heads(site: ScoreInput, kept: Sequence[int], group: int, gqa_groups: str) -> tuple[int, ...]:
    """Return the heads after the swaps of `HeadCorrelation`."""
    return _correlation(site).swap(kept, group, gqa_groups)


def elimination(site: ScoreInput) -> Tensor:
    """Return `elimination_ranks`, [units]."""
    return elimination_ranks(site.full_moment, site.weight, site.units, site.removed, site.damping)


def measured_before(site: ScoreInput) -> Tensor:
    """Return what weight_gradients.py or curvature_pass.py has measured of the units before the first layer changed.

    At sparsity 0 nothing is measured, and nothing goes.
    """
    return torch.zeros(site.units) if site.measured is None else site.measured


def removal_costs(
    moment_CC: Tensor, gradient_moment_DD: Tensor, weight_DC: Tensor, units: int, damping: float
) -> Tensor:
    """Return what removing each unit costs the loss when all other channels make up for it, [units]: LLM-Surgeon.

    The curvature of the loss in the weights W is approximated by the Kronecker product of A, the second moment of the
    inputs, and G, that of the gradients at the outputs. With H = A + lambda I, removing the channels Q of a unit costs
    1/2 tr(G W_Q ([H^-1]_QQ)^-1 W_Q^T). Each unit is removed alone, from the same weights.

    Args:
        moment_CC: A, up to a factor.
        gradient_moment_DD: G, up to a factor.
        weight_DC: W, of the output projection.
        units: number of units of equally many neighbouring channels: heads, or single channels.
        damping: lambda relative to the mean diagonal of A.
    """
    blocks = unit_blocks(damped_inverse(moment_CC, damping), units)
    parts_UwD = weight_DC.double().T.reshape(units, -1, weight_DC.shape[0])
    with decomposing():
        inverses = torch.linalg.inv(blocks)
    costs = 0.5 * (inverses * ((parts_UwD @ gradient_moment_DD) @ parts_UwD.transpose(1, 2))).sum((1, 2))
    return costs.clamp_min(0.0)


def without_channels(moment_CC: Tensor, weight_DC: Tensor, gone: Tensor, damping: float) -> Tensor:
    """Return W without some channels, with the others made up for it, [D, C] float64; zeros in what is gone.

    Of all W' whose columns Q are zero, the one that minimises tr(G (W - W') H (W - W')^T), H = A + lambda I, for any G:
    W - W_Q ([H^-1]_QQ)^-1 [H^-1]_Q,: , which is W_K + W_Q H_QK (H_KK)^-1 in the columns K that stay.

    Args:
        moment_CC: A, up to a factor.
        weight_DC: W, of the output projection.
        gone: which channels go, bool [C].
        damping: lambda relative to the mean diagonal of A.
    """
    weight_CD = weight_DC.double().T
    kept = ~gone
    gram, found = moment_CC[kept][:, kept], torch.zeros_like(weight_CD)
    # ridge_solve damps relative to the channels that stay; lambda is relative to all.
    relative = damping * float(moment_CC.diagonal().mean() / gram.diagonal().mean().clamp_min(1e-300))
    found[kept] = ridge_solve(gram, moment_CC[kept] @ weight_CD, relative, weight_CD[kept])
    return found.T


def leverage(site: ScoreInput) -> Tensor:
    """Return `leverage_scores`, [C]."""
    return leverage_scores(site.full_moment, site.damping)


def _correlation(site: ScoreInput) -> HeadCorrelation:
    return HeadCorrelation(site.full_moment, site.total, site.num_tokens, site.weight, site.units)


def weight_energy(weight_DC: Tensor) -> Tensor:
    """Return ||W_:,i||^2, [C]."""
    return weight_DC.double().square().sum(0)


def energy_scores(energy_C: Tensor, weight_DC: Tensor) -> Tensor:
    """Return ||X_:,i||^2 ||W_:,i||^2, [C]; Paper: Eq. 2 for channels.

    Args:
        energy_C: ||X_:,i||^2, the diagonal of the second moment.
        weight_DC: weight of the output projection.
    """
    return energy_C * weight_energy(weight_DC)


def norm_scores(energy_C: Tensor, weight_DC: Tensor) -> Tensor:
    """Return ||X_:,i|| mean_j |W_ji|, [C]: structured Wanda, the mean over the outputs of Wanda's |W_ji| ||X_:,i||."""
    return energy_C.sqrt() * weight_DC.double().abs().mean(0)


def magnitude_scores(energy_C: Tensor) -> Tensor:
    """Return ||X_:,i||, [C]: TransAct, which looks at activations only."""
    return energy_C.sqrt()


def fluctuation_scores(energy_C: Tensor, sum_C: Tensor, num_tokens: float, weight_DC: Tensor) -> Tensor:
    """Return Var(X_:,i) ||W_:,i||^2, [C]: FLAP, whose repair by a bias makes up for the mean of a channel.

    Args:
        energy_C: ||X_:,i||^2.
        sum_C: sum of X_:,i over the tokens.
        num_tokens: N.
        weight_DC: weight of the output projection.
    """
    variance = energy_C / num_tokens - (sum_C / num_tokens).square()
    return variance.clamp_min(0.0) * weight_energy(weight_DC)


def feature_scores(moment_CC: Tensor, sum_C: Tensor, num_tokens: float, weight_DC: Tensor) -> Tensor:
    """Return ||X_:,i|| ||s(Lambda / mean) Q^T W_:,i||, [C]: the first part of SlimLLM's score of FFN channels.

    Q and Lambda are eigenvectors and eigenvalues of the covariance of the outputs X W^T: a channel counts by what it
    adds to the directions in which the output varies most. The sigmoid s keeps the weights of the directions between
    0.5 and 1, as in the published code; without it, the one or two directions of massive activations decide alone.

    Args:
        moment_CC: X^T X.
        sum_C: sum of X over the tokens.
        num_tokens: N.
        weight_DC: weight of the output projection.
    """
    weight, mean = weight_DC.double(), sum_C / num_tokens
    covariance = moment_CC / num_tokens - torch.outer(mean, mean)
    values, vectors = eigh_descending(weight @ covariance @ weight.T)
    importance = (values / values.mean().clamp_min(1e-300)).sigmoid()
    return moment_CC.diagonal().sqrt() * (importance[:, None] * (vectors.T @ weight)).norm(dim=0)


def reading_scores(read_energy_D: Tensor, reading: Sequence[Tensor]) -> Tensor:
    """Return the sum over gate and up of || W_i,: * ||x|| ||, [C]: the other part of SlimLLM's score of FFN channels.

    Args:
        read_energy_D: ||x_:,j||^2 of what the FFN reads.
        reading: weights of gate and up, [C, D] each.
    """
    norms_D = read_energy_D.sqrt()
    return torch.stack([(weight_CD.double() * norms_D).norm(dim=1) for weight_CD in reading]).sum(0)


def leverage_scores(moment_CC: Tensor, damping: float) -> Tensor:
    """Return the ridge leverage of each channel, diag(G (G + lambda I)^-1), [C]. Paper: MoDeGPT, Type I.

    Args:
        moment_CC: G = X^T X.
        damping: lambda relative to the mean diagonal.
    """
    # Symmetric, and G and (G + lambda I)^-1 commute.
    return ridge_solve(moment_CC, moment_CC, damping).diagonal().clone()


def head_products(moment_CC: Tensor, weight_DC: Tensor, num_heads: int) -> Tensor:
    """Return sum_t o_htj o_gtj for each output channel j, [D, H, H], for o_h = X_h W_h^T, the output of one head."""
    weight = weight_DC.double()
    products = []
    for moment_dC, weight_Dd in zip(moment_CC.chunk(num_heads), weight.chunk(num_heads, 1), strict=True):
        parts_DC = (weight_Dd @ moment_dC) * weight
        products.append(parts_DC.unflatten(1, (num_heads, -1)).sum(2))
    return torch.stack(products, 1)


class HeadCorrelation:
    """Pearson correlations over the tokens of the block's output o with the output of some of its heads.

    As in the published code, the sizes of the correlations of all output channels are added up.

    Args:
        moment_CC: second moment of the context.
        sum_C: its sum over the tokens.
        num_tokens: N.
        weight_DC: weight of o_proj.
        num_heads: H.
    """

    def __init__(self, moment_CC: Tensor, sum_C: Tensor, num_tokens: float, weight_DC: Tensor, num_heads: int) -> None:
        means_DH = (sum_C * weight_DC.double()).unflatten(1, (num_heads, -1)).sum(2) / num_tokens
        products_DHH = head_products(moment_CC, weight_DC, num_heads) / num_tokens
        self._num_heads = num_heads
        self._covariance_DHH = products_DHH - means_DH[:, :, None] * means_DH[:, None, :]
        self._with_all_DH = self._covariance_DHH.sum(2)
        self._total_D = self._with_all_DH.sum(1)

    def of(self, heads: Sequence[int]) -> float:
        """Return the sum of |correlation of o with the sum of the outputs of `heads`|; a constant channel adds 0."""
        kept = list(heads)
        variance_D = self._covariance_DHH[:, kept][:, :, kept].sum((1, 2)) * self._total_D
        covariance_D = self._with_all_DH[:, kept].sum(1)
        varies = variance_D > 0
        return float((covariance_D[varies].abs() / variance_D[varies].sqrt()).sum())

    def scores(self) -> Tensor:
        """Return minus what `of` gives for all heads but h, [H]: SlimLLM's score of a head."""
        heads = range(self._num_heads)
        return -torch.tensor([self.of([g for g in heads if g != head]) for head in heads], dtype=torch.float64)

    def swap(self, kept: Sequence[int], group: int, groups: str) -> tuple[int, ...]:
        """Exchange kept heads for others as long as that raises the correlation; the block costs the same.

        Args:
            kept: heads to start from.
            group: query heads per kv head in the dense model.
            groups: "ragged", or "uniform" for one group size.
        """
        best, best_value = tuple(kept), self.of(kept)
        num_kv = len(kept_kv_heads(kept, group))
        while True:
            others = [head for head in range(self._num_heads) if head not in best]
            swaps = [tuple(sorted({*best, new} - {old})) for old in best for new in others]
            allowed = [
                heads
                for heads in swaps
                if len(kept_kv_heads(heads, group)) == num_kv
                and (groups == "ragged" or len(set(heads_per_kv(heads, group))) == 1)
            ]
            found = max(allowed, key=self.of, default=best)
            # Rounding must not make two choices of the same correlation alternate.
            if self.of(found) <= best_value * (1.0 + 1e-12):
                return best
            best, best_value = found, self.of(found)


def elimination_ranks(moment_CC: Tensor, weight_DC: Tensor, units: int, count: int, damping: float) -> Tensor:
    """Return when greedy optimal-brain-surgeon elimination removes each unit: 0 first; those that stay share the top.

    With H = X^T X + lambda I, removing the channels Q of a unit costs tr(W_Q ([H^-1]_QQ)^-1 W_Q^T) when all others
    make up for it; then W <- W - W_Q ([H^-1]_QQ)^-1 [H^-1]_Q,: and H^-1 loses the unit in the same way. SoBP.

    Args:
        moment_CC: X^T X.
        weight_DC: weight of the output projection.
        units: number of units of equally many neighbouring channels: heads, or single channels.
        count: units to remove.
        damping: lambda relative to the mean diagonal.
    """
    width = moment_CC.shape[0] // units
    inverse = damped_inverse(moment_CC, damping)
    weight_CD = weight_DC.double().T.contiguous()
    ranks = torch.full((units,), float(count), dtype=torch.float64)
    for rank in range(count):
        gone = ranks < count
        # What is gone has zero rows in H^-1; any invertible block does, because its cost is masked.
        blocks = unit_blocks(inverse, units) + torch.eye(width, dtype=torch.float64) * gone[:, None, None]
        parts = weight_CD.view(units, width, -1)
        with decomposing():
            costs = (torch.linalg.inv(blocks) * (parts @ parts.transpose(1, 2))).sum((1, 2))
        unit = int(costs.masked_fill(gone, torch.inf).argmin())
        ranks[unit] = rank
        rows = slice(unit * width, (unit + 1) * width)
        with decomposing():
            update = torch.linalg.solve(blocks[unit], inverse[rows])  # [width, C]
        weight_CD.addmm_(update.T, weight_CD[rows].clone(), alpha=-1.0)
        inverse.addmm_(inverse[:, rows].clone(), update, alpha=-1.0)
        weight_CD[rows] = 0.0
        inverse[rows] = 0.0
        inverse[:, rows] = 0.0
    return ranks
