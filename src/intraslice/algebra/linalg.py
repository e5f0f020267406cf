"""Pure float64 linear algebra. Symmetric matrices are second moments (sums of x^T x, uncentred).

Shapes: P kept channels, C channels, M targets, d head_dim, r kept head_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from intraslice.errors import NumericalError

logger = logging.getLogger(__name__)


@contextmanager
def decomposing() -> Iterator[None]:
    """Turn a failure of LAPACK into our error: nothing that it was handed can be decomposed.

    Raises:
        NumericalError: eigenvalues did not converge, or a matrix has no inverse or factor.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericalError(
            "the second moments of the activations cannot be decomposed; are there weights far beyond all others, or "
            "norms of nearly zero?"
        ) from error


def eigh_descending(moment_CC: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues [..., C] (largest first, clipped at 0) and eigenvectors [..., C, C] (columns)."""
    with decomposing():
        values, vectors = torch.linalg.eigh(moment_CC)
    return values.flip(-1).clamp_min(0.0), vectors.flip(-1)


_WEAKEST = 1e-3
"""Where damping is relative to each channel's own energy: the least energy that counts, relative to the mean."""


def ridge_solve(
    gram_PP: Tensor,
    cross_PM: Tensor,
    damping: float,
    prior_PM: Tensor | None = None,
    *,
    per_channel: bool = False,
) -> Tensor:
    """Return W [P, M] that minimises ||Y - Z W||^2 + lambda ||W - W_0||^2; Paper: Eq. 6 and Eq. 8 with W_0 = 0.

    W = W_0 + (G + lambda I)^-1 (B - G W_0), or with diag(G) in the place of I: then every channel is as uncertain as
    its own energy says, and a few channels of huge activations do not decide how much the others are damped. With W_0
    the weights that plain removal would leave, directions of which the calibration tokens say little keep their weights
    instead of being shrunk to zero.

    Args:
        gram_PP: second moment G = Z^T Z of the kept channels.
        cross_PM: cross moment B = Z^T Y with the target.
        damping: lambda, relative to the mean diagonal of the second moment, or to each entry of the diagonal.
        prior_PM: W_0; None is zero.
        per_channel: whether it is relative to each entry, no less than a thousandth of the mean: a channel without
            energy has to have some damping.

    Raises:
        NumericalError: the system stays singular with a thousand times the damping.
    """
    scale = gram_PP.diagonal().mean()
    if not torch.isfinite(scale) or not torch.isfinite(cross_PM).all():
        raise NumericalError("the second moments of the activations contain NaN or infinite values.")
    prior = torch.zeros_like(cross_PM) if prior_PM is None else prior_PM
    if scale <= 0:
        return prior  # dead channels: nothing to reconstruct from
    missing = cross_PM - gram_PP @ prior
    if per_channel:
        unit = torch.diag(gram_PP.diagonal().clamp_min(_WEAKEST * scale))
    else:
        unit = scale * torch.eye(gram_PP.shape[0], dtype=gram_PP.dtype)
    for attempt in (damping, max(damping, 1e-6) * 1e3):
        factor, info = torch.linalg.cholesky_ex(gram_PP + attempt * unit)
        if int(info) == 0:
            return prior + torch.cholesky_solve(missing, factor)
        logger.warning("second moment is singular with damping %g; trying more", attempt)
    raise NumericalError(
        f"the ridge system of {gram_PP.shape[0]} channels cannot be solved with damping {damping}; raise it."
    )


def damped_inverse(moment_CC: Tensor, damping: float) -> Tensor:
    """Return (A + lambda I)^-1, [C, C], with lambda relative to the mean diagonal of A.

    Raises:
        NumericalError: the matrix cannot be inverted.
    """
    identity = torch.eye(moment_CC.shape[0], dtype=moment_CC.dtype)
    # The floor is for blocks that are dead on the calibration text: there the weights alone decide.
    return ridge_solve(moment_CC + 1e-30 * identity, identity, damping)


def unit_blocks(matrix_CC: Tensor, units: int) -> Tensor:
    """Return the diagonal blocks of units of equally many neighbouring channels, [units, C / units, C / units]."""
    width = matrix_CC.shape[0] // units
    return matrix_CC.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def residual_energy(target_energy: float, gram_PP: Tensor, cross_PM: Tensor, solution_PM: Tensor) -> float:
    """Return ||Y - Z W||^2 from second moments: ||Y||^2 - 2 <Z^T Y, W> + <W, Z^T Z W>."""
    fitted = (solution_PM * (gram_PP @ solution_PM)).sum()
    return float(target_energy - 2.0 * (cross_PM * solution_PM).sum() + fitted)


def low_rank_scores(query_dd: Tensor, key_dd: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return bases A, B [d, r] that minimise ||Q K^T - (Q A)(K B)^T||_F over all pairs of tokens.

    With Q^T Q = L L^T and K^T K = R R^T the best rank-r scores are the truncated SVD of L^T R = U S V^T, so
    A = L^-T U_r S_r^(1/2) and B = R^-T V_r S_r^(1/2). This is Q_1 of the paper where no RoPE stands between.

    Args:
        query_dd: second moment of the queries, summed over the query heads that share the key head.
        key_dd: second moment of the keys (centred: a constant added to all keys cancels in the softmax).
        rank: r.
    """
    width = query_dd.shape[0]
    identity = torch.eye(width, dtype=query_dd.dtype)

    def factor(moment: Tensor) -> Tensor:
        scale = moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
        return torch.linalg.cholesky(moment + 1e-8 * scale * identity)

    with decomposing():
        query_factor, key_factor = factor(query_dd), factor(key_dd)
        left, singular, right_t = torch.linalg.svd(query_factor.T @ key_factor)
    root = singular[:rank].sqrt()
    query_basis = torch.linalg.solve_triangular(query_factor.T, left[:, :rank] * root, upper=True)
    key_basis = torch.linalg.solve_triangular(key_factor.T, right_t[:rank].T * root, upper=True)
    return query_basis, key_basis


def low_rank_product(moment_dd: Tensor, reader_gram_dd: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [d, r] and B [r, d] such that V A B W^T is the best approximation of V W^T of this rank.

    With V^T V = R R^T the product is Q R^T W^T with orthonormal Q, so A = R^-T U_r and B = U_r^T R^T with the leading
    left singular vectors U_r of R^T W^T, which are the eigenvectors of R^T (W^T W) R; B A = I.

    Args:
        moment_dd: V^T V, the second moment of the values of one kv head.
        reader_gram_dd: W^T W of the output weights that read them, summed over the query heads of the kv head.
        rank: r.
    """
    width = moment_dd.shape[0]
    scale = moment_dd.diagonal().mean().clamp_min(torch.finfo(moment_dd.dtype).tiny)
    root = torch.linalg.cholesky(moment_dd + 1e-8 * scale * torch.eye(width, dtype=moment_dd.dtype))
    leading = eigh_descending(root.T @ reader_gram_dd @ root)[1][:, :rank]
    return torch.linalg.solve_triangular(root.T, leading, upper=True), leading.T @ root.T


def rotate_blocks(vectors_NC: Tensor, bases_bww: Tensor) -> Tensor:
    """Multiply rows [N, C] by a block-diagonal matrix given as blocks [C / w, w, w]; Paper: g Q_s in Eq. 11."""
    blocks, width, _ = bases_bww.shape
    rotated = torch.einsum("nbw,bwv->nbv", vectors_NC.view(-1, blocks, width), bases_bww)
    return rotated.reshape(vectors_NC.shape)
