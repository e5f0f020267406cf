"""Adaptive head compression; Paper: section 3.1, Algorithm 2.

Two looks at the block: `choose_qk` on the dense context picks heads, widths and RoPE pairs; `solve_value` on the
context that is left after that computes the value basis Q_2 and the dense reconstruction Q_2*.

Shapes: N tokens, D hidden_size, H query heads, K kv heads, d head_dim, r and p pruned widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from intraslice.edits import AttentionWeights, QKEdit, ValueEdit
from intraslice.linalg import eigh_descending, low_rank_scores, residual_energy, ridge_solve
from intraslice.options import AttentionOptions
from intraslice.selection import (
    HeadPlan,
    adaptive_heads,
    kept_kv_heads,
    planned_heads,
    reconstruction_score,
    round_to_multiple,
    top_indices,
    whole_heads,
)


@dataclass(frozen=True, kw_only=True)
class AttentionStats:
    """Sums over tokens of the block at its dense shape, float64.

    Attributes:
        context: second moment of each head's context, [H, d, d].
        query: second moment of the queries (after RoPE), [H, d, d].
        key: second moment of the keys (after RoPE), [K, d, d].
        key_sum: sum of the keys, [K, d].
        query_abs: sum of |q|, [H, d]; key_abs: sum of |k|, [K, d].
        num_tokens: N.
    """

    context: Tensor
    query: Tensor
    key: Tensor
    key_sum: Tensor
    query_abs: Tensor
    key_abs: Tensor
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class ContextMoments:
    """Sums over tokens after query/key pruning and head removal, float64.

    Attributes:
        context: X'^T X', [H' * d, H' * d].
        target: X'^T Y with Y the block's dense output without bias, [H' * d, D].
        target_energy: ||Y||^2.
    """

    context: Tensor
    target: Tensor
    target_energy: float


def head_scores(context_Hdd: Tensor, o_weight: Tensor) -> Tensor:
    """Return R_h = sum over the head's channels of ||X_:,i||^2 ||W_i,:||^2, [H]; Paper: Eq. 2."""
    channel_energy = context_Hdd.diagonal(dim1=1, dim2=2)
    weight_energy = o_weight.double().square().sum(0).view(channel_energy.shape)
    return (channel_energy * weight_energy).sum(1)


def rope_pair_scores(query_abs_Hd: Tensor, key_abs_Kd: Tensor, num_tokens: int, pairs_to_channels: Tensor) -> Tensor:
    """Return the mean |q k| of the two channels of each pair after RoPE, per query head, [H, d / 2].

    Over all pairs of tokens the mean of |q_t k_s| is the product of the means of |q| and |k|.

    Args:
        query_abs_Hd: sum of |q| over the tokens.
        key_abs_Kd: sum of |k|.
        num_tokens: N.
        pairs_to_channels: int64 [d / 2, 2].
    """
    group = query_abs_Hd.shape[0] // key_abs_Kd.shape[0]
    product_Hd = query_abs_Hd * key_abs_Kd.repeat_interleave(group, 0) / num_tokens**2
    return product_Hd[:, pairs_to_channels].sum(-1)


def choose_qk(
    weights: AttentionWeights,
    stats: AttentionStats,
    budget: float,
    options: AttentionOptions,
    pairs_to_channels: Tensor | None,
    plan: HeadPlan | None = None,
    shared_pairs: Sequence[int] | None = None,
) -> QKEdit:
    """Choose heads, widths and what replaces query and key.

    Args:
        weights: dense weights of the block.
        stats: sums over the dense block.
        budget: linear weights that the block may keep.
        options: settings.
        pairs_to_channels: int64 [d / 2, 2] channels of each RoPE pair; None without RoPE.
        plan: exact shape of the block; None leaves it to the budget.
        shared_pairs: the pairs to keep, when all heads of the model keep the same.
    """
    _, head_dim, hidden_size = weights.q.shape
    # q and o cost D weights per query head and dimension, k and v per kv head: two matrices of the same width.
    budget_dims = budget / (2 * hidden_size)
    scores = head_scores(stats.context, weights.o)
    spectrum, _ = eigh_descending(stats.context)
    if plan is not None:
        choice = planned_heads(
            reconstruction_score(scores, spectrum, range(len(scores)), plan.width),
            num_kv_heads=plan.num_key_value_heads,
            group=plan.group,
            dense_group=weights.group,
        )
        width = plan.width
    elif options.adaptive_heads:
        choice = adaptive_heads(
            scores,
            spectrum,
            budget_dims=budget_dims,
            group=weights.group,
            min_width=options.min_head_fraction * head_dim,
            groups=options.groups,
        )
        # One width for query, key and value: attention kernels are fastest when they agree.
        low = min(options.head_multiple, head_dim)
        width = round_to_multiple(choice.width, options.head_multiple, low, head_dim)
    else:
        choice = whole_heads(
            scores, budget_dims=budget_dims, head_dim=head_dim, group=weights.group, groups=options.groups
        )
        width = head_dim
    edit = QKEdit(heads=choice.heads, width=width)
    if width == head_dim:
        return edit
    kv_heads = kept_kv_heads(choice.heads, weights.group)
    members = {kv: [head for head in choice.heads if head // weights.group == kv] for kv in kv_heads}
    if shared_pairs is not None:
        return replace(edit, rope_pairs=torch.tensor(shared_pairs).repeat(len(kv_heads), 1))
    if pairs_to_channels is not None:
        pair_scores = rope_pair_scores(stats.query_abs, stats.key_abs, stats.num_tokens, pairs_to_channels)
        pairs = torch.stack([top_indices(pair_scores[members[kv]].sum(0), width // 2) for kv in kv_heads])
        return replace(edit, rope_pairs=pairs)
    bases = []
    for kv in kv_heads:
        mean = stats.key_sum[kv] / stats.num_tokens
        centred_key = stats.key[kv] - stats.num_tokens * torch.outer(mean, mean)
        bases.append(low_rank_scores(stats.query[members[kv]].sum(0), centred_key, width))
    return replace(
        edit,
        query_basis=torch.stack([query for query, _ in bases]),
        key_basis=torch.stack([key for _, key in bases]),
    )


def solve_value(
    o_weight: Tensor,
    per_kv: tuple[int, ...],
    v_width: int,
    moments: ContextMoments,
    options: AttentionOptions,
    *,
    whole: bool = False,
) -> tuple[ValueEdit, float]:
    """Return Q_2 and the new o_proj, and the block's relative error; Paper: Eq. 6.

    Q_2 of a kv head is made of the top eigenvectors of the second moments of its query heads' contexts, summed.
    With Z = X' Q_2 the new output weight is the ridge regression of Y on Z, dense over the heads.

    Args:
        o_weight: output weight of the kept heads at full width, [D, H' * d]; used when nothing is reconstructed.
        per_kv: query heads of each kept kv head.
        v_width: p.
        moments: sums over the pruned block.
        options: settings.
        whole: nothing was removed from query, key and heads; then at full width the block is left as it is.
    """
    num_heads = sum(per_kv)
    head_dim = moments.context.shape[0] // num_heads
    blocks = moments.context.view(num_heads, head_dim, num_heads, head_dim)
    diagonal = torch.stack([blocks[head, :, head] for head in range(num_heads)])
    bases, start = [], 0
    for count in per_kv:
        _, vectors = eigh_descending(diagonal[start : start + count].sum(0))
        bases.append(vectors[:, :v_width] if v_width < head_dim else torch.eye(head_dim, dtype=torch.float64))
        start += count
    basis = torch.stack(bases)
    per_head = basis.repeat_interleave(torch.tensor(per_kv), 0)
    projection = torch.block_diag(*per_head)  # [H' * d, H' * p]
    gram = projection.T @ moments.context @ projection
    cross = projection.T @ moments.target
    removed = projection.T @ o_weight.double().T  # what removal without repair leaves
    if options.reconstruct and not (whole and v_width == head_dim):
        prior = removed if options.shrink_to == "weights" else None
        solution = ridge_solve(gram, cross, options.damping, prior)
    else:
        solution = removed
    error = residual_energy(moments.target_energy, gram, cross, solution)
    relative = max(error, 0.0) / max(moments.target_energy, 1e-30)
    return ValueEdit(v_basis=basis, o_weight=solution.T.contiguous()), relative
