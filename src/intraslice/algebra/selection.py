"""Discrete choices: which heads, RoPE pairs and channels stay, and how many.

Shapes: H query heads, K kv heads, d head_dim, F intermediate_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intraslice.errors import BudgetError

MULTIPLES = (8, 4, 2, 1)
"""Widths that matrix kernels like, best first; for methods that choose one width for everything."""

TOLERANCE = 0.005
"""How far the sparsity that is reached may be from the one that was asked for."""


@dataclass(frozen=True)
class HeadChoice:
    """Which query heads stay and how wide they are.

    Attributes:
        heads: kept query heads (numbers of the dense model, ascending).
        width: kept dimensions a head before rounding, P / |kappa|.
    """

    heads: tuple[int, ...]
    width: float


@dataclass(frozen=True, kw_only=True)
class HeadPlan:
    """The exact shape of an attention block: every kv head serves `group` query heads of `width` dimensions."""

    num_key_value_heads: int
    group: int
    width: int


def kept_kv_heads(heads: Sequence[int], group: int) -> tuple[int, ...]:
    """Return the kv heads that still serve a query head, ascending."""
    return tuple(sorted({head // group for head in heads}))


def heads_per_kv(heads: Sequence[int], group: int) -> tuple[int, ...]:
    """Return how many kept query heads each kept kv head serves."""
    return tuple(sum(head // group == kv for head in heads) for kv in kept_kv_heads(heads, group))


def reconstruction_score(scores_H: Tensor, spectrum_Hd: Tensor, heads: Sequence[int], width: float) -> Tensor:
    """Return R_h^p of each head in `heads`; Paper: Eq. 3, linear between whole dimensions.

    Args:
        scores_H: R_h, the importance of each head (Eq. 2).
        spectrum_Hd: eigenvalues of each head's second moment, largest first.
        heads: heads to score.
        width: p, may be fractional.
    """
    spectrum = spectrum_Hd[list(heads)]
    total = spectrum.sum(-1).clamp_min(torch.finfo(spectrum.dtype).tiny)
    whole = int(width)
    part = spectrum[:, :whole].sum(-1)
    if whole < spectrum.shape[1]:
        part = part + (width - whole) * spectrum[:, whole]
    return scores_H[list(heads)] * part / total


def shared_width(budget_dims: float, heads: int, qk_width: int | None) -> float:
    """Return the width that heads can have.

    Args:
        budget_dims: head dimensions to share, of query and value (or key and output) alike.
        heads: query and kv heads together.
        qk_width: width that query and key keep; None when they are as wide as the value.
    """
    return budget_dims / heads if qk_width is None else max(0.0, 2.0 * budget_dims / heads - qk_width)


def weakest_unit(heads: Sequence[int], group: int, groups: str, scores: Mapping[int, float]) -> tuple[int, ...] | None:
    """Return the query heads to remove next, or None when the group policy allows no removal.

    "ragged": the weakest single head. "uniform": every group keeps the same size, so either all heads of one kv head
    go, or the weakest head of each group; whichever has the lower score per head. "whole": all heads of one kv head.
    """
    if groups == "ragged":
        return (min(heads, key=lambda head: scores[head]),)
    members = {kv: [head for head in heads if head // group == kv] for kv in kept_kv_heads(heads, group)}
    units = [tuple(group_heads) for group_heads in members.values()] if len(members) > 1 else []
    if groups == "uniform" and min(len(group_heads) for group_heads in members.values()) > 1:
        units.append(tuple(min(group_heads, key=lambda head: scores[head]) for group_heads in members.values()))
    return min(units, key=lambda unit: sum(scores[head] for head in unit) / len(unit), default=None)


def adaptive_heads(
    scores_H: Tensor,
    spectrum_Hd: Tensor,
    *,
    budget_dims: float,
    group: int,
    min_width: float,
    groups: str,
    qk_width: int | None = None,
    budget: str = "weights",
    order: str = "kept_score",
) -> HeadChoice:
    """Choose the heads to keep by greedy removal; Paper: Eq. 4-5, Algorithm 2.

    A query head and a kv head cost the same weights per dimension, so the budget is shared by both: with grouped
    queries p = budget / (|query heads| + |kv heads|), which is the paper's P / |kappa| for one kv head a query head.

    Args:
        scores_H: R_h of each query head.
        spectrum_Hd: eigenvalues of each head's second moment, largest first.
        budget_dims: head dimensions to share: query and kv heads times their width.
        group: query heads a kv head in the dense model.
        min_width: heads are removed as long as they would be narrower than this.
        groups: "ragged", "uniform" or "whole".
        qk_width: width that query and key keep whatever happens; None when they are as wide as the value.
        budget: "weights", or "queries": the same share of the query dimensions alone, as published; p = P / |kappa|
            with kv heads as wide as query heads, so that fewer weights go.
        order: which head is tried next, and when that ends. "kept_score": the one with the smallest R_h^p, until one
            gains nothing. "score": by R_h, each once, and none whose removal leaves more than heads can be wide
            (Algorithm 2, line 10).
    """
    num_heads, head_dim = spectrum_Hd.shape
    kv_share = num_heads / (num_heads + num_heads // group)

    def wanted_width(heads: Sequence[int]) -> float:
        if budget == "queries":
            return shared_width(budget_dims * kv_share, len(heads), qk_width)
        return shared_width(budget_dims, len(heads) + len(kept_kv_heads(heads, group)), qk_width)

    kept, tried = list(range(num_heads)), set[int]()
    width = min(float(head_dim), wanted_width(kept))
    while len(kept) > 1:
        current = reconstruction_score(scores_H, spectrum_Hd, kept, width)
        values = scores_H[kept] if order == "score" else current
        by_head = dict(zip(kept, values.tolist(), strict=True))
        candidates = [head for head in kept if head not in tried]
        unit = weakest_unit(candidates, group, groups, by_head) if candidates else None
        if unit is None:
            break
        rest = [head for head in kept if head not in unit]
        rest_width = wanted_width(rest)
        too_wide = order == "score" and rest_width > head_dim
        rest_width = min(float(head_dim), rest_width)
        gain = float(reconstruction_score(scores_H, spectrum_Hd, rest, rest_width).sum() - current.sum())
        if too_wide or (gain <= 0 and width >= min_width):
            if order == "kept_score" or groups != "ragged":
                break
            tried.update(unit)
            continue
        kept, width = rest, rest_width
    return HeadChoice(tuple(kept), width)


def whole_heads(scores_H: Tensor, *, budget_dims: float, head_dim: int, group: int, groups: str) -> HeadChoice:
    """Choose whole heads: remove the weakest until the cost is as near to the budget as it gets (Table 4, no Ada-H).

    Args:
        scores_H: R_h of each query head (Eq. 2).
        budget_dims: as in `adaptive_heads`.
        head_dim: d, which every kept head keeps.
        group: query heads a kv head.
        groups: "ragged", "uniform" or "whole".
    """
    by_head = dict(enumerate(scores_H.tolist()))

    def cost(heads: Sequence[int]) -> float:
        return head_dim * (len(heads) + len(kept_kv_heads(heads, group)))

    kept = list(range(len(by_head)))
    while len(kept) > 1 and cost(kept) > budget_dims:
        unit = weakest_unit(kept, group, groups, by_head)
        if unit is None:
            break
        rest = [head for head in kept if head not in unit]
        if abs(cost(rest) - budget_dims) > abs(cost(kept) - budget_dims):
            break
        kept = rest
    return HeadChoice(tuple(kept), float(head_dim))


def planned_heads(scores_H: Tensor, *, num_kv_heads: int, group: int, dense_group: int) -> HeadChoice:
    """Choose the best `num_kv_heads` groups of the best `group` query heads each.

    Args:
        scores_H: score of each query head.
        num_kv_heads: kv heads to keep.
        group: query heads to keep of each.
        dense_group: query heads a kv head in the dense model.
    """
    grouped = scores_H.view(-1, dense_group)
    members = torch.argsort(grouped, dim=1, descending=True, stable=True)[:, :group]  # [K, group]
    kept = top_indices(grouped.gather(1, members).sum(1), num_kv_heads)
    heads = sorted((kept[:, None] * dense_group + members[kept]).flatten().tolist())
    return HeadChoice(tuple(heads), float("nan"))


def round_to_multiple(value: float, multiple: int, low: int, high: int) -> int:
    """Return the multiple nearest to `value` within [low, high]; `high` itself is allowed even when it is no multiple.

    Raises:
        BudgetError: low > high.
    """
    if low > high:
        raise BudgetError(f"no width between {low} and {high} exists; lower ffn_multiple or head_multiple.")
    steps = [*range(-(-low // multiple) * multiple, high, multiple), high]
    return min(steps, key=lambda width: abs(width - value))


def top_indices(scores_C: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest scores, ascending (stable: ties go to the lower index)."""
    order = torch.argsort(scores_C, descending=True, stable=True)
    return order[:count].sort().values
