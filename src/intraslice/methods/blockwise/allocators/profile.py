"""Allocation from one forward pass of the dense model: FLAP's global ranking, SlimLLM's layer ratios.

Shapes: L layers, H query heads, d head_dim, F intermediate_size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from intraslice.layers.sites import ATTENTION, FFN, ModelSites
from intraslice.methods.blockwise.allocators.base import Allocation, split_sparsity
from intraslice.methods.blockwise.allocators.mask_gradient import keep_ranked_together
from intraslice.methods.blockwise.options import AllocationOptions


@dataclass(frozen=True)
class ModelProfile:
    """What the forward pass measured.

    Attributes:
        fluctuation: for each layer, by the name of the site, the fluctuation scores of its tap, one row per unit:
            [H, d] of `context`, [F, 1] of `act`.
        similarity: for each layer, the mean over the tokens of the cosine similarity of its input and output.
    """

    fluctuation: tuple[Mapping[str, Tensor], ...]
    similarity: tuple[float, ...]

    def of(self, sites: ModelSites, kind: str) -> list[Tensor]:
        """Return the fluctuation scores of all sites of a kind, in the order of `ModelSites.of`."""
        return [self.fluctuation[layer][site.name] for layer, site in sites.of(kind)]


def standardized(scores: Tensor) -> Tensor:
    """Return (scores - mean) / standard deviation over all channels of a site; 0 where all are equal."""
    deviation = scores - scores.mean()
    return deviation / scores.std().clamp_min(1e-30)


def allocate_by_fluctuation(
    measured: ModelProfile, sites: ModelSites, sparsity: float, options: AllocationOptions
) -> Allocation:
    """Rank heads and FFN channels of all layers together by standardized fluctuations: FLAP.

    Scores are standardized within each site, those of attention channels squared before (as in the published code,
    which keeps more heads that way); a head counts the mean of its channels, and a unit weighs its share of the site's
    linear weights: a head more than a channel.
    """
    heads = [standardized(scores.square()).mean(1) for scores in measured.of(sites, ATTENTION)]
    channels = [standardized(scores).flatten() for scores in measured.of(sites, FFN)]
    keep = keep_ranked_together({ATTENTION: heads, FFN: channels}, sites, sparsity, options.max_site_sparsity)
    return Allocation.of_kinds(sites, keep)


def allocate_by_similarity(
    measured: ModelProfile, sites: ModelSites, sparsity: float, options: AllocationOptions
) -> Allocation:
    """Take from each layer in proportion to softmax(alpha * similarity of its input and output): SlimLLM.

    The layers of the lowest similarity are kept, kept_layers of all of them, as long as the others can lose it all
    under the cap.
    """
    losses = split_sparsity(sites, sparsity, options)
    highest = max(measured.similarity)
    shares = [math.exp(options.similarity_scale * (value - highest)) for value in measured.similarity]
    order = sorted(range(len(shares)), key=lambda layer: (measured.similarity[layer], layer))
    whole = set(order[: round(options.kept_layers * len(shares))])
    keep = {}
    for kind, mean in zip((ATTENTION, FFN), losses, strict=True):
        layers = [layer for layer, _ in sites.of(kind)]
        kept = {place for place, layer in enumerate(layers) if layer in whole}
        lost = spread_loss([shares[layer] for layer in layers], mean, options.max_site_sparsity, kept)
        keep[kind] = [1.0 - value for value in lost]
    return Allocation.of_kinds(sites, keep)


def spread_loss(
    shares: Sequence[float], mean: float, cap: float, kept: Collection[int], weights: Sequence[float] | None = None
) -> list[float]:
    """Return what each layer loses: in proportion to its share, at most the cap, `mean` on average.

    The layers in `kept` lose only what the others cannot. On average all layers count alike, or by their weights.
    """
    layers = len(shares)
    weights = [1.0] * layers if weights is None else weights
    losses = [0.0] * layers
    left = mean * sum(weights)
    for free in ([layer for layer in range(layers) if layer not in kept], sorted(kept)):
        while free and left > 1e-12:
            scale = left / sum(shares[index] * weights[index] for index in free)
            full = [index for index in free if scale * shares[index] >= cap]
            for index in full or free:
                losses[index] = min(cap, scale * shares[index])
                left -= losses[index] * weights[index]
            free = [index for index in free if index not in full] if full else []
    return losses
