"""Allocation from one forward pass of the dense model: FLAP's global ranking, SlimLLM's layer ratios.

Shapes: L layers, H query heads, d head_dim, F intermediate_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from intraslice.methods.blockwise.allocators.base import Allocation, BlockSizes, split_sparsity
from intraslice.methods.blockwise.allocators.mask_gradient import keep_fractions
from intraslice.methods.blockwise.options import AllocationOptions


@dataclass(frozen=True)
class LayerProfile:
    """What the forward pass measured, one entry a layer.

    Attributes:
        context_fluctuation: fluctuation scores of the channels of `context`, [H, d].
        act_fluctuation: fluctuation scores of the channels of `act`, [F].
        similarity: mean over the tokens of the cosine similarity of the layer's input and output.
    """

    context_fluctuation: tuple[Tensor, ...]
    act_fluctuation: tuple[Tensor, ...]
    similarity: tuple[float, ...]


def standardised(scores: Tensor) -> Tensor:
    """Return (scores - mean) / standard deviation over all channels of a block; 0 where all are equal."""
    deviation = scores - scores.mean()
    return deviation / scores.std().clamp_min(1e-30)


def allocate_by_fluctuation(
    profile: LayerProfile, sizes: BlockSizes, sparsity: float, options: AllocationOptions
) -> Allocation:
    """Rank heads and FFN channels of all layers together by standardised fluctuations: FLAP.

    Scores are standardised within each block, those of attention channels squared before (as in the published code,
    which keeps more heads that way); a head counts the mean of its channels, and a unit weighs its share of the block's
    linear weights: a head more than a channel.
    """
    heads = [standardised(scores.square()).mean(1) for scores in profile.context_fluctuation]
    channels = [standardised(scores) for scores in profile.act_fluctuation]
    kept = keep_fractions(heads + channels, sizes.attention + sizes.ffn, sparsity, options.max_block_sparsity)
    return Allocation(tuple(kept[: len(heads)]), tuple(kept[len(heads) :]))


def allocate_by_similarity(
    profile: LayerProfile, sizes: BlockSizes, sparsity: float, options: AllocationOptions
) -> Allocation:
    """Take from each layer in proportion to softmax(alpha * similarity of its input and output): SlimLLM.

    The first and the last layer are kept as long as the others can lose it all under the cap.
    """
    attention, ffn = split_sparsity(sizes, sparsity, options)
    highest = max(profile.similarity)
    shares = [math.exp(options.similarity_scale * (value - highest)) for value in profile.similarity]
    cap = options.max_block_sparsity
    kept = [tuple(1.0 - lost for lost in spread_loss(shares, ratio, cap)) for ratio in (attention, ffn)]
    return Allocation(kept[0], kept[1])


def spread_loss(shares: Sequence[float], mean: float, cap: float) -> list[float]:
    """Return what each layer loses: in proportion to its share, at most the cap, `mean` on average.

    The first and the last layer lose what the others cannot.
    """
    layers = len(shares)
    losses = [0.0] * layers
    inner = list(range(1, layers - 1))
    left = mean * layers
    for free in (inner, sorted(set(range(layers)) - set(inner))):
        while free and left > 1e-12:
            scale = left / sum(shares[index] for index in free)
            full = [index for index in free if scale * shares[index] >= cap]
            for index in full or free:
                losses[index] = min(cap, scale * shares[index])
                left -= losses[index]
            free = [index for index in free if index not in full] if full else []
    return losses
