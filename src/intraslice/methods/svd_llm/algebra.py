"""Two factors per weight, from a truncated SVD that knows the inputs. Paper: SVD-LLM, arXiv 2403.07378.

Shapes: O outputs, C inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from intraslice.algebra.linalg import decomposing, eigh_descending
from intraslice.algebra.selection import MULTIPLES, TOLERANCE
from intraslice.errors import BudgetError

Ranks = tuple[tuple[str, int], ...]
"""(path, rank) of the weights of one layer that become two factors."""


def plan_ranks(layers: Sequence[Mapping[str, tuple[int, int]]], sparsity: float) -> list[Ranks]:
    """Return the ranks of every layer: of each weight the same share is kept.

    What rounding leaves over (or overdraws) goes to the next weight, so that the total meets the budget. A weight whose
    factors would be no smaller than itself is left out: it stays as it is.

    Args:
        layers: for each layer, (outputs, inputs) of its Linears by path.
        sparsity: fraction of the weights to remove.

    Raises:
        BudgetError: the weights are too small to come close to the budget.
    """
    total = sum(rows * columns for sizes in layers for rows, columns in sizes.values())
    reached = 0.0
    for multiple in MULTIPLES:
        plan, kept = _plan(layers, sparsity, multiple)
        reached = 1 - kept / total
        if abs(reached - sparsity) <= TOLERANCE:
            return plan
    raise BudgetError(
        f"sparsity {sparsity:g} was asked for, but whole ranks of weights this small reach only {reached:.4f}; choose "
        "a sparsity near that."
    )


def _plan(layers: Sequence[Mapping[str, tuple[int, int]]], sparsity: float, multiple: int) -> tuple[list[Ranks], int]:
    plan: list[Ranks] = []
    carry, kept = 0.0, 0
    for sizes in layers:
        ranks: list[tuple[str, int]] = []
        for path, (rows, columns) in sizes.items():
            whole = rows * columns
            wanted = (1 - sparsity) * whole + carry
            rank = max(multiple, multiple * round(wanted / (rows + columns) / multiple))
            cost = whole if wanted >= whole else min(rank * (rows + columns), whole)
            if cost < whole:
                ranks.append((path, rank))
            carry = wanted - cost
            kept += cost
        plan.append(tuple(ranks))
    return plan, kept


def square_root(moment_CC: Tensor) -> Tensor:
    """Return S [C, C] with S S^T = the second moment.

    The paper takes the Cholesky factor. Any root gives the same weights, and this one exists for singular moments too.
    """
    values, vectors = eigh_descending(moment_CC)
    return vectors * values.sqrt()


def factor_weight(weight_OC: Tensor, root_CC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors whose product W' minimises ||X W^T - X W'^T||_F over all weights of this rank.

    The error is ||(W - W') S||_F with X^T X = S S^T, so W' S is the truncated SVD of W S = U Sigma V^T; that is
    U_r U_r^T W S, and W' = U_r (U_r^T W) needs no inverse of S.

    Args:
        weight_OC: W.
        root_CC: S.
        rank: r.

    Returns:
        first U_r^T W [r, C] and second U_r [O, r].
    """
    product = weight_OC @ root_CC
    # Eigenvectors of the smaller Gram matrix are several times as fast as an SVD, and float64 bears the square.
    if product.shape[0] <= product.shape[1]:
        second = eigh_descending(product @ product.T)[1][:, :rank]
    else:
        right = eigh_descending(product.T @ product)[1][:, :rank]
        with decomposing():
            second = torch.linalg.qr(product @ right).Q
    return second.T @ weight_OC, second
