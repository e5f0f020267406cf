"""Norms of narrower vectors that come near to the norms of the whole ones. Pure float64.

RMSNorm divides a vector x by sqrt(e / d + eps), with e the energy (sum of squares) of all its d channels. Over tokens,
e is close to a weighted sum of the energies of the r channels that stay: e = sum_j w_j x_j^2 + b. With that

    x_j / sqrt((sum_i w_i x_i^2 + b) / d + eps)

is an RMSNorm over r channels of c_j x_j with c_j^2 = w_j r eps / (b + d eps), and with the gain sqrt(d / (r w_j)): the
factors c_j go into the rows that make x, the gains into the norm's weight, and eps stays as it is.

Shapes: N tokens, V vectors a token (heads, or one), d width of a vector, r kept width.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKAGE = 1e-3
UPDATES = 300
SPREAD = 16.0
"""The largest ratio of a weight of the energies to what all of a head have in common."""


def energy_rows(x_NVd: Tensor, eps: float) -> Tensor:
    """Return what the fits are summed over, [N, V, d + 1].

    The energies of the channels and a one, divided by the whole energy: so the error of the fit is relative to what
    the norm divides by.

    Args:
        x_NVd: vectors before the norm.
        eps: of the norm.
    """
    energy = x_NVd.float().square()
    whole = energy.sum(-1, keepdim=True) + x_NVd.shape[-1] * eps
    return torch.cat((energy / whole, 1.0 / whole), dim=-1)


def fit_dropped_energy(moment_Vcc: Tensor, kept_Vd: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and b of e_R = a e_S + b for each vector, [V] each, none of them negative; weighted least squares.

    e_S is the energy of the channels that stay, e_R that of the others: one weight w = 1 + a for all that stay.

    Args:
        moment_Vcc: second moments of `energy_rows`, [V, d + 1, d + 1].
        kept_Vd: whether a channel stays, bool [V, d].
    """
    a, b = torch.zeros(len(moment_Vcc), dtype=torch.float64), torch.zeros(len(moment_Vcc), dtype=torch.float64)
    for vector, (moment, kept) in enumerate(zip(moment_Vcc.double(), kept_Vd, strict=True)):
        stays, goes, one = (torch.zeros(moment.shape[0], dtype=torch.float64) for _ in range(3))
        stays[:-1], goes[:-1], one[-1] = kept.double(), (~kept).double(), 1.0
        ss, s1, oo = stays @ moment @ stays, stays @ moment @ one, one @ moment @ one
        sr, r1 = stays @ moment @ goes, one @ moment @ goes
        determinant = ss * oo - s1 * s1
        slope, offset = sr / ss.clamp_min(1e-300), torch.zeros(())
        if determinant > 1e-12 * ss * oo:
            slope = (sr * oo - r1 * s1) / determinant
            offset = (r1 * ss - sr * s1) / determinant
            if offset < 0:
                slope, offset = sr / ss, torch.zeros(())
            elif slope < 0:
                slope, offset = torch.zeros(()), r1 / oo
        a[vector], b[vector] = slope.clamp_min(0.0), offset
    return a, b


def fit_energy_weights(
    moment_Vcc: Tensor, kept_Vd: Tensor, groups_gn: Tensor, shrinkage: float = SHRINKAGE
) -> tuple[Tensor, Tensor]:
    """Return w and b of e = sum_j w_j x_j^2 + b for each vector, [V, d] and [V], none of them negative.

    Weighted least squares again, with what all weights have in common in `fit_dropped_energy` as the start and as the
    value that w is pulled to. The factors of the multiplicative update of non-negative least squares (Lee and Seung)
    keep all signs, because moments of energies are not negative.

    Args:
        moment_Vcc: second moments of `energy_rows`, [V, d + 1, d + 1].
        kept_Vd: whether a channel stays, bool [V, d].
        groups_gn: channels that share a weight, int64 [g, n]: the pairs of RoPE, or one channel each. Groups stay or go
            as a whole.
        shrinkage: weight of the pull, relative to the mean diagonal of the moment.

    Returns:
        w, with the common value for channels that go, and b.
    """
    a, b = fit_dropped_energy(moment_Vcc, kept_Vd)
    num_vectors, num_channels = kept_Vd.shape
    # Sums over the groups, and the one.
    sums = torch.zeros(len(groups_gn) + 1, num_channels + 1, dtype=torch.float64)
    sums[:-1].scatter_(1, groups_gn, 1.0)
    sums[-1, -1] = 1.0
    moment = sums @ moment_Vcc.double() @ sums.T  # [V, g + 1, g + 1]
    stays = torch.cat((kept_Vd[:, groups_gn[:, 0]], torch.ones(num_vectors, 1, dtype=torch.bool)), 1).double()
    everything = torch.ones(len(sums), dtype=torch.float64)
    everything[-1] = 0.0
    wanted = (moment @ everything) * stays  # [V, g + 1]
    gram = moment * stays[:, :, None] * stays[:, None, :]
    pull = shrinkage * gram.diagonal(dim1=1, dim2=2)[:, :-1].sum(1) / stays[:, :-1].sum(1).clamp_min(1.0)
    pull = torch.cat((pull[:, None].expand(-1, len(groups_gn)), torch.zeros(num_vectors, 1)), 1) * stays
    # An offset of zero would stay zero; a hundredth of what the norm typically divides by is a start.
    floor = 0.01 / moment[:, -1, -1].clamp_min(1e-300).sqrt()
    common = (1.0 + a)[:, None]
    start = torch.cat((common.expand(-1, len(groups_gn)), torch.maximum(b, floor)[:, None]), 1)
    found = start.clone()
    for _ in range(UPDATES):
        divisor = torch.einsum("vgh,vh->vg", gram, found) + pull * found
        found = torch.where(divisor > 0, found * (wanted + pull * start) / divisor.clamp_min(1e-300), found)
    # Half precision would lose digits of norms that differ by more.
    of_groups = torch.minimum(torch.maximum(found[:, :-1], common / SPREAD), common * SPREAD)
    weights = common.repeat(1, num_channels)
    weights[:, groups_gn] = of_groups[:, :, None].expand(-1, -1, groups_gn.shape[1])
    return weights, found[:, -1]


def norm_correction(w_Vd: Tensor, b_V: Tensor, kept_width: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gains of a narrower RMSNorm, and the factors on its input, [V, d] each.

    Args:
        w_Vd: weights of the energies.
        b_V: offset of the energy.
        kept_width: r.
        eps: of the norm.
    """
    width = w_Vd.shape[1]
    return (width / (kept_width * w_Vd)).sqrt(), (w_Vd * kept_width * eps / (b_V + width * eps)[:, None]).sqrt()
