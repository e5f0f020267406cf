"""Global ranking of channels by their mask gradients; Paper: section 3.3, Eq. 9-11.

Shapes: S calibration sequences, C channels of a tap (H * d for `context`, F for `act`), w width of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intraslice.algebra.linalg import eigh_descending, rotate_blocks
from intraslice.methods.blockwise.allocators.base import Allocation, BlockSizes, split_sparsity
from intraslice.methods.blockwise.options import AllocationOptions


@dataclass(frozen=True)
class MaskScores:
    """What the gradient pass measured, one entry a layer.

    Attributes:
        context_grad: gradients of the loss of each sequence with respect to a mask on `context`, [S, H * d].
        act_grad: the same on `act`, [S, F].
        context_moment: second moment of `context` in blocks of one head, [H, d, d].
        act_moment: second moment of `act` in blocks of neighbouring channels, [F / w, w, w].
        pair_scores: mean |q k| of each rotary pair of the dense head, summed over the query heads, [d / 2]; None
            without RoPE.
    """

    context_grad: tuple[Tensor, ...]
    act_grad: tuple[Tensor, ...]
    context_moment: tuple[Tensor, ...]
    act_moment: tuple[Tensor, ...]
    pair_scores: tuple[Tensor, ...] | None = None


def channel_importance(grad_SC: Tensor, moment_bww: Tensor | None) -> Tensor:
    """Return the sum over sequences of the squared gradient, [C]; Paper: Eq. 10, or Eq. 11 with a moment.

    Args:
        grad_SC: mask gradients, one row a sequence.
        moment_bww: second moments of blocks of channels; their eigenvectors are the blocks of Q_s. None: Eq. 10.
    """
    if moment_bww is not None:
        _, vectors = eigh_descending(moment_bww)
        grad_SC = rotate_blocks(grad_SC, vectors)
    return grad_SC.square().sum(0)


def keep_fractions(importance: Sequence[Tensor], sizes: Sequence[int], sparsity: float, cap: float) -> list[float]:
    """Return the fraction of units that each layer keeps when the most important units of all layers stay.

    A threshold on the importance is searched such that the kept weights, with no layer losing more than `cap`,
    meet the target; ties and rounding are spread over the layers that are free to move.

    Args:
        importance: one tensor of unit importances a layer.
        sizes: linear weights of each layer's block.
        sparsity: fraction of all these weights to remove.
        cap: largest fraction that one layer may lose.
    """
    target = (1.0 - sparsity) * sum(sizes)
    floor = 1.0 - cap

    def fractions(threshold: float) -> list[float]:
        return [max(floor, float((unit > threshold).double().mean())) for unit in importance]

    thresholds = torch.cat([unit.flatten() for unit in importance]).sort().values
    low, high = 0, len(thresholds) - 1  # kept weights fall as the index rises
    while low < high:
        middle = (low + high) // 2
        kept = sum(f * size for f, size in zip(fractions(float(thresholds[middle])), sizes, strict=True))
        low, high = (middle + 1, high) if kept > target else (low, middle)
    result = fractions(float(thresholds[low]))
    for _ in range(len(sizes)):
        missing = target - sum(f * size for f, size in zip(result, sizes, strict=True))
        free = [i for i, f in enumerate(result) if (f < 1.0 if missing > 0 else f > floor)]
        room = sum(sizes[i] for i in free)
        if not room or abs(missing) < 0.5:
            break
        for i in free:
            result[i] = min(1.0, max(floor, result[i] + missing / room))
    return result


def allocate_by_head_search(
    scores: MaskScores, sizes: BlockSizes, sparsity: float, options: AllocationOptions
) -> Allocation:
    """Rank whole heads and channels by squared mask gradients and search the number of heads: SoBP's first stage.

    For each number of heads that the model may keep, the best heads stay, and the best channels that fit in the rest
    of the budget; the number that keeps most importance wins. A mask on a head has the sum of its channels' gradients.
    """
    heads = [
        channel_importance(grad.view(len(grad), len(moment), -1).sum(2), None)
        for grad, moment in zip(scores.context_grad, scores.context_moment, strict=True)
    ]
    channels = [channel_importance(grad, None) for grad in scores.act_grad]
    ranked_heads, ranked_channels = (
        torch.cat([torch.zeros(1, dtype=torch.float64), torch.cat(list(units)).sort(descending=True).values.cumsum(0)])
        for units in (heads, channels)
    )
    total_attention, total_ffn = sum(sizes.attention), sum(sizes.ffn)
    budget = (1.0 - sparsity) * (total_attention + total_ffn)
    cap = options.max_block_sparsity
    best = None
    for count in range(len(ranked_heads)):
        attention = count / (len(ranked_heads) - 1)
        ffn = (budget - attention * total_attention) / total_ffn
        if not (1.0 - cap - 1e-9 <= attention and 1.0 - cap - 1e-9 <= ffn <= 1.0 + 1e-9):
            continue
        value = float(ranked_heads[count] + ranked_channels[int(ffn * (len(ranked_channels) - 1))])
        if best is None or value > best[0]:
            best = (value, 1.0 - attention, 1.0 - ffn)
    # No whole number of heads leaves the FFN a possible rest: both lose the same.
    _, attention, ffn = best or (0.0, sparsity, sparsity)
    return Allocation(
        tuple(keep_fractions(heads, sizes.attention, attention, cap)),
        tuple(keep_fractions(channels, sizes.ffn, ffn, cap)),
    )


def allocate_by_mask_gradient(
    scores: MaskScores, sizes: BlockSizes, sparsity: float, options: AllocationOptions
) -> Allocation:
    """Rank attention units against attention units and FFN units against FFN units over all layers."""
    attention, ffn = split_sparsity(sizes, sparsity, options)

    def importance(grads: Sequence[Tensor], moments: Sequence[Tensor], rotate: bool) -> list[Tensor]:
        return [
            channel_importance(grad, moment if rotate else None) for grad, moment in zip(grads, moments, strict=True)
        ]

    context = importance(scores.context_grad, scores.context_moment, options.pca_attention)
    act = importance(scores.act_grad, scores.act_moment, options.pca_ffn)
    cap = options.max_block_sparsity
    return Allocation(
        tuple(keep_fractions(context, sizes.attention, attention, cap)),
        tuple(keep_fractions(act, sizes.ffn, ffn, cap)),
    )
