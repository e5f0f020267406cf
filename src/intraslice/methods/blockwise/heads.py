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

from intraslice.algebra.linalg import eigh_descending, low_rank_product, low_rank_scores
from intraslice.algebra.norms import fit_dropped_energy, fit_energy_weights, norm_correction
from intraslice.algebra.selection import (
    HeadChoice,
    HeadPlan,
    adaptive_heads,
    kept_kv_heads,
    planned_heads,
    reconstruction_score,
    round_to_multiple,
    shared_width,
    top_indices,
    whole_heads,
)
from intraslice.layers.weights import AttentionWeights, NormEdit, QKEdit, ValueEdit, kept_channels
from intraslice.methods.blockwise.options import AttentionOptions
from intraslice.methods.blockwise.repairs import Output, OutputMoments, repair_output
from intraslice.methods.blockwise.scores import ScoreInput, unit_scores
from intraslice.methods.blockwise.strategies import PAIR_SCORES, SCORES
from intraslice.methods.choices import load


@dataclass(frozen=True)
class QKNorms:
    """What the norms of query and key compute.

    Attributes:
        over: "head", or "all" heads of a token together.
        offset: what they add to their weight.
        eps: what they add to the mean square.
    """

    over: str
    offset: float
    eps: float


@dataclass(frozen=True, kw_only=True)
class AttentionStats:
    """Sums over tokens of the block at its dense shape, float64.

    Attributes:
        context: second moment of each head's context, [H, d, d].
        context_sum: sum of the context, [H * d].
        context_full: second moment over all heads, [H * d, H * d]; None unless the score needs it.
        value_energy: sum of the squared values, [K, d].
        query: second moment of the queries (after RoPE), [H, d, d].
        key: second moment of the keys (after RoPE), [K, d, d].
        key_sum: sum of the keys, [K, d].
        query_abs: sum of |q|, [H, d]; key_abs: sum of |k|, [K, d].
        query_square: sum of q^2, [H, d]; key_square: sum of k^2, [K, d].
        num_tokens: N.
        norms: norms of query and key; None where the family has none.
        value: second moment of the values, [K, d, d]; None unless the basis needs it.
        query_energy, key_energy: second moments of `energy_rows` of what these norms read; [H or 1, ...] and
            [K or 1, ...].
    """

    context: Tensor
    context_sum: Tensor
    context_full: Tensor | None
    value_energy: Tensor
    query: Tensor
    key: Tensor
    key_sum: Tensor
    query_abs: Tensor
    key_abs: Tensor
    query_square: Tensor
    key_square: Tensor
    num_tokens: int
    norms: QKNorms | None = None
    value: Tensor | None = None
    query_energy: Tensor | None = None
    key_energy: Tensor | None = None


def score_input(
    stats: AttentionStats, o_weight: Tensor, options: AttentionOptions, measured: Tensor | None = None
) -> ScoreInput:
    """Return what scores of heads are computed from.

    Args:
        stats: sums over the dense site.
        o_weight: [D, H * d].
        options: settings.
        measured: scores of the heads that were measured before the first layer changed, [H].
    """
    num_heads = len(stats.context)
    return ScoreInput(
        energy=stats.context.diagonal(dim1=1, dim2=2).flatten(),
        total=stats.context_sum,
        moment=stats.context_full,
        num_tokens=stats.num_tokens,
        weight=o_weight,
        units=num_heads,
        # Up to the last one: how many go is decided by their weights.
        removed=num_heads - 1,
        damping=options.obs_damping,
        measured=measured,
    )


def head_scores(
    stats: AttentionStats, o_weight: Tensor, options: AttentionOptions, measured: Tensor | None = None
) -> Tensor:
    """Return what each head is worth by the score that `options.score` names, R_h of Eq. 2 unless told otherwise, [H].

    Args:
        stats: sums over the dense site.
        o_weight: [D, H * d].
        options: settings.
        measured: scores of the heads that were measured before the first layer changed, [H].
    """
    scores = load(SCORES[options.score].heads)(score_input(stats, o_weight, options, measured))
    return unit_scores(scores, len(stats.context))


def choose_qk(
    weights: AttentionWeights,
    stats: AttentionStats,
    budget: float,
    options: AttentionOptions,
    pairs_to_channels: Tensor | None,
    plan: HeadPlan | None = None,
    shared_pairs: Sequence[int] | None = None,
    measured: Tensor | None = None,
) -> QKEdit:
    """Choose heads, widths and what replaces query and key.

    Args:
        weights: dense weights of the block.
        stats: sums over the dense block.
        budget: linear weights that the block may keep.
        options: settings.
        pairs_to_channels: int64 [d / 2, 2] channels of each RoPE pair; None without RoPE.
        plan: exact shape of the block; None leaves it to the budget.
        shared_pairs: the pairs to keep, when all rotated heads of the model keep the same.
        measured: scores of the heads that were measured before the first layer changed, [H].
    """
    _, head_dim, hidden_size = weights.q.shape
    # q and o cost D weights per query head and dimension, k and v per kv head: two matrices of the same width.
    budget_dims = budget / (2 * hidden_size)
    qk_width = head_dim if options.qk_width == "dense" else None
    scores = head_scores(stats, weights.o, options, measured)
    spectrum, _ = eigh_descending(stats.context)
    if plan is not None:
        choice = planned_heads(
            reconstruction_score(scores, spectrum, range(len(scores)), plan.width),
            num_kv_heads=plan.num_key_value_heads,
            group=plan.group,
            dense_group=weights.group,
        )
        width = plan.width
    elif options.heads == "all":
        width = shared_width(budget_dims, len(scores) + len(weights.k), qk_width)
        choice = HeadChoice(tuple(range(len(scores))), width)
        width = _rounded_width(choice.width, head_dim, options)
    elif options.heads == "adaptive":
        choice = adaptive_heads(
            scores,
            spectrum,
            budget_dims=budget_dims,
            group=weights.group,
            min_width=options.min_head_fraction * head_dim,
            groups=options.gqa_groups,
            qk_width=qk_width,
            budget=options.head_budget,
            order=options.removal_order,
        )
        width = _rounded_width(choice.width, head_dim, options)
    else:
        choice = whole_heads(
            scores, budget_dims=budget_dims, head_dim=head_dim, group=weights.group, groups=options.gqa_groups
        )
        width = head_dim
        if refine := SCORES[options.score].refine:
            site = score_input(stats, weights.o, options)
            heads = load(refine)(site, choice.heads, weights.group, options.gqa_groups)
            choice = replace(choice, heads=heads)
    edit = QKEdit(heads=choice.heads, width=width, qk_width=qk_width)
    if width < head_dim:
        edit = _narrowed(edit, weights, stats, options, pairs_to_channels, shared_pairs)
    return _with_norms(edit, weights, stats, pairs_to_channels, headed=shared_pairs is None)


def _rounded_width(width: float, head_dim: int, options: AttentionOptions) -> int:
    # One width for query, key and value: attention kernels are fastest when they agree.
    low = min(options.head_multiple, head_dim)
    return round_to_multiple(width, options.head_multiple, low, head_dim)


def _narrowed(
    edit: QKEdit,
    weights: AttentionWeights,
    stats: AttentionStats,
    options: AttentionOptions,
    pairs_to_channels: Tensor | None,
    shared_pairs: Sequence[int] | None,
) -> QKEdit:
    """Add what the narrower heads of an edit keep of the dense ones."""
    width, head_dim = edit.width, weights.q.shape[1]
    kv_heads = kept_kv_heads(edit.heads, weights.group)
    members = {kv: [head for head in edit.heads if head // weights.group == kv] for kv in kv_heads}
    if stats.value is not None:
        grams = [[weight.T @ weight for weight in _output_weights(weights, members[kv])] for kv in kv_heads]
        maps = [
            low_rank_product(stats.value[kv], torch.stack(of_heads).sum(0), width)
            for kv, of_heads in zip(kv_heads, grams, strict=True)
        ]
        edit = replace(edit, v_maps=(torch.stack([a for a, _ in maps]), torch.stack([b for _, b in maps])))
    if options.basis == "channels":
        edit = replace(edit, v_channels=torch.stack([top_indices(stats.value_energy[kv], width) for kv in kv_heads]))
    if edit.qk_width is not None:
        return edit
    if shared_pairs is not None and pairs_to_channels is not None:
        return replace(edit, rope_pairs=torch.tensor(shared_pairs).repeat(len(kv_heads), 1))
    # A norm and a rotation of the channels do not commute.
    one_by_one = options.basis != "pca" or options.pair_score == "energy"
    if pairs_to_channels is not None or one_by_one or stats.norms is not None:
        # Without RoPE every channel is on its own.
        single = torch.arange(head_dim)[:, None]
        units = single if pairs_to_channels is None else pairs_to_channels
        by_energy = options.pair_score == "energy"
        sums = (stats.query_square, stats.key_square) if by_energy else (stats.query_abs, stats.key_abs)
        scores = PAIR_SCORES[options.pair_score].load()(*sums, stats.num_tokens, units)
        count = width // units.shape[1]
        kept = torch.stack([top_indices(scores[members[kv]].sum(0), count) for kv in kv_heads])
        if pairs_to_channels is not None:
            return replace(edit, rope_pairs=kept)
        return replace(edit, channels=kept)
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


def _output_weights(weights: AttentionWeights, heads: Sequence[int]) -> list[Tensor]:
    """Return the columns of o_proj that read each of the heads, [D, d], float64."""
    parts = weights.o.double().unflatten(1, (len(weights.q), -1))
    return [parts[:, head] for head in heads]


def _with_norms(
    edit: QKEdit, weights: AttentionWeights, stats: AttentionStats, pairs_to_channels: Tensor | None, headed: bool
) -> QKEdit:
    """Add what the norms of query and key need to come near to those of the dense heads.

    Args:
        edit: the kept heads and channels.
        weights: dense weights.
        stats: sums over the dense site.
        pairs_to_channels: channels of each RoPE pair; None without RoPE.
        headed: whether every head may have its own; otherwise one gain serves all, and the epsilon stays.
    """
    norms = stats.norms
    if norms is None or stats.query_energy is None or stats.key_energy is None:
        return edit
    head_dim = weights.q.shape[1]
    channels, kv_heads = kept_channels(edit, pairs_to_channels), kept_kv_heads(edit.heads, weights.group)
    if channels is None and (norms.over == "head" or len(edit.heads) == len(weights.q)):
        return edit
    if channels is None:
        channels = torch.arange(head_dim).repeat(len(kv_heads), 1)
    kept_of_kv = torch.zeros(len(weights.k), head_dim, dtype=torch.bool)
    kept_of_kv[list(kv_heads)] = kept_of_kv[list(kv_heads)].scatter(1, channels, True)
    of_queries = torch.zeros(len(weights.q), head_dim, dtype=torch.bool)
    for head in edit.heads:
        of_queries[head] = kept_of_kv[head // weights.group]

    groups = torch.arange(head_dim)[:, None] if pairs_to_channels is None else pairs_to_channels

    def correction(moment: Tensor, kept: Tensor, heads: Sequence[int]) -> NormEdit:
        if norms.over == "all":
            # As many weights as channels would be more than a few thousand tokens can tell.
            a, b = fit_dropped_energy(moment, kept.flatten()[None])
            w = (1.0 + a)[:, None].expand(-1, kept.numel())
            gain, scale = norm_correction(w, b, int(kept.sum()), norms.eps)
            return NormEdit(gain=gain.view(kept.shape)[list(heads)], row_scale=scale.view(kept.shape)[list(heads)])
        moment, kept = moment[list(heads)], kept[list(heads)]
        if not headed:
            # All heads keep the same channels, so their sums add up.
            moment, kept = moment.sum(0, keepdim=True), kept[:1]
        gain, scale = norm_correction(*fit_energy_weights(moment, kept, groups), int(kept[0].sum()), norms.eps)
        return NormEdit(gain=gain.expand(len(heads), -1), row_scale=scale.expand(len(heads), -1))

    return replace(
        edit,
        norm_offset=norms.offset,
        query_norm=correction(stats.query_energy, of_queries, edit.heads),
        key_norm=correction(stats.key_energy, kept_of_kv, kv_heads),
    )


def selection_basis(channels_Kp: Tensor, head_dim: int) -> Tensor:
    """Return the basis of each kv head that keeps these channels, [K, d, p]."""
    return torch.eye(head_dim, dtype=torch.float64)[channels_Kp].transpose(1, 2).contiguous()


def solve_value(
    o_weight: Tensor,
    per_kv: tuple[int, ...],
    v_width: int,
    moments: OutputMoments,
    options: AttentionOptions,
    *,
    v_channels: Tensor | None = None,
    v_maps: tuple[Tensor, Tensor] | None = None,
    whole: bool = False,
) -> tuple[ValueEdit, float]:
    """Return Q_2 and the new o_proj, and the block's relative error; Paper: Eq. 6.

    Q_2 of a kv head is made of the top eigenvectors of the second moments of its query heads' contexts, summed.
    With Z = X' Q_2 the new output weight is the ridge regression of Y on Z, dense over the heads, or what another
    repair makes of Q_2^T W_o.

    Args:
        o_weight: output weight of the kept heads at full width, [D, H' * d].
        per_kv: query heads of each kept kv head.
        v_width: p.
        moments: sums over tokens after query/key pruning and head removal; Z is the context.
        options: settings.
        v_channels: int64 [K', p], channels that make up Q_2 instead of eigenvectors.
        v_maps: Q_2 and what takes its place in front of W_o, [K', d, p] and [K', p, d], instead of eigenvectors and
            their transpose.
        whole: nothing was removed from query, key and heads; then at full width the block is left as it is.
    """
    num_heads = sum(per_kv)
    head_dim = moments.gram.shape[0] // num_heads
    if v_channels is not None:
        basis = selection_basis(v_channels, head_dim)
    elif v_maps is not None:
        basis = v_maps[0]
    else:
        basis = _leading_bases(moments.gram, per_kv, v_width)
    back = basis.transpose(1, 2) if v_maps is None else v_maps[1]
    per_head, back_per_head = (maps.repeat_interleave(torch.tensor(per_kv), 0) for maps in (basis, back))
    kept = moments.projected(torch.block_diag(*per_head))  # [H' * d, H' * p]
    removed = torch.block_diag(*back_per_head) @ o_weight.double().T  # what removal without repair leaves
    output = Output(removed) if whole and v_width == head_dim else repair_output(kept, removed, options)
    edit = ValueEdit(v_basis=basis, o_weight=output.weight.T.contiguous(), o_bias=output.bias)
    return edit, output.relative_error(kept)


def _leading_bases(context_CC: Tensor, per_kv: tuple[int, ...], v_width: int) -> Tensor:
    """Return the top eigenvectors of each kv head's share of the context, [K', d, p]."""
    num_heads = sum(per_kv)
    head_dim = context_CC.shape[0] // num_heads
    blocks = context_CC.view(num_heads, head_dim, num_heads, head_dim)
    diagonal = torch.stack([blocks[head, :, head] for head in range(num_heads)])
    bases, start = [], 0
    for count in per_kv:
        _, vectors = eigh_descending(diagonal[start : start + count].sum(0))
        bases.append(vectors[:, :v_width] if v_width < head_dim else torch.eye(head_dim, dtype=torch.float64))
        start += count
    return torch.stack(bases)
