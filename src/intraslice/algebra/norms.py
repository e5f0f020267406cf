"""Norms of narrower vectors that come near to the norms of the whole ones. Pure float64.

RMSNorm divides a vector x by sqrt((e_S + e_R) / d + eps), with e_S the energy (sum of squares) of the channels that
stay and e_R that of the channels that go. Over tokens, e_R is close to a e_S + b. With that

    x_S / sqrt(((1 + a) e_S + b) / d + eps)

is an RMSNorm over the r channels that stay, with the gain sqrt(d / ((1 + a) r)) and the epsilon
(b + d eps) / ((1 + a) r). Another epsilon than eps is had by scaling x, because RMSNorm(c x) with eps is RMSNorm(x)
with eps / c^2.

Shapes: N tokens, V vectors a token (heads, or one), d width of a vector, r kept width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def energy_rows(x_NVd: Tensor, eps: float) -> Tensor:
    """Return what the fit of e_R = a e_S + b is summed over, [N, V, d + 1].

    The energies of the channels and a one, divided by the whole energy: so the error of the fit is relative to what
    the norm divides by.

    Args:
        x_NVd: vectors before the norm.
        eps: of the norm.
    """
    energy = x_NVd.float().square()
    whole = energy.sum(-1, keepdim=True) + x_NVd.shape[-1] * eps
    return torch.cat((energy / whole, 1.0 / whole), dim=-1)


def fit_dropped_energy(moment_Vcc: Tensor, kept_Vd: Tensor, with_offset: bool = True) -> tuple[Tensor, Tensor]:
    """Return a and b of e_R = a e_S + b for each vector, [V] each, none of them negative; weighted least squares.

    Args:
        moment_Vcc: second moments of `energy_rows`, [V, d + 1, d + 1].
        kept_Vd: whether a channel stays, bool [V, d].
        with_offset: whether b may differ from 0.
    """
    a, b = torch.zeros(len(moment_Vcc), dtype=torch.float64), torch.zeros(len(moment_Vcc), dtype=torch.float64)
    for vector, (moment, kept) in enumerate(zip(moment_Vcc.double(), kept_Vd, strict=True)):
        stays, goes, one = (torch.zeros(moment.shape[0], dtype=torch.float64) for _ in range(3))
        stays[:-1], goes[:-1], one[-1] = kept.double(), (~kept).double(), 1.0
        ss, s1, oo = stays @ moment @ stays, stays @ moment @ one, one @ moment @ one
        sr, r1 = stays @ moment @ goes, one @ moment @ goes
        determinant = ss * oo - s1 * s1
        slope, offset = sr / ss.clamp_min(1e-300), torch.zeros(())
        if with_offset and determinant > 1e-12 * ss * oo:
            slope = (sr * oo - r1 * s1) / determinant
            offset = (r1 * ss - sr * s1) / determinant
            if offset < 0:
                slope, offset = sr / ss, torch.zeros(())
            elif slope < 0:
                slope, offset = torch.zeros(()), r1 / oo
        a[vector], b[vector] = slope.clamp_min(0.0), offset
    return a, b


def norm_correction(a: Tensor, b: Tensor, width: int, kept_width: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gain of a narrower RMSNorm, and the factor on its input that stands for another epsilon.

    Args:
        a: from `fit_dropped_energy`, [V].
        b: the same.
        width: d.
        kept_width: r.
        eps: of the norm.
    """
    gain = (width / ((1.0 + a) * kept_width)).sqrt()
    wanted = (b + width * eps) / ((1.0 + a) * kept_width)
    return gain, (eps / wanted).sqrt()
