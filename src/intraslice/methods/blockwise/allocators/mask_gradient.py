"""Global ranking of channels by their mask gradients; Paper: section 3.3, Eq. 9-11.

Shapes: S calibration sequences, C channels of a tap (H * d for `context`, F for `act`), w width of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intraslice.algebra.linalg import eigh_descending, rotate_blocks
from intraslice.errors import NumericalError
from intraslice.layers.sites import ATTENTION, FFN, ModelSites
from intraslice.methods.blockwise.allocators.base import Allocation, split_sparsity
from intraslice.methods.blockwise.options import AllocationOptions


@dataclass(frozen=True)
class SiteGradients:
    """What the gradient pass measured of one site.

    Attributes:
        grad: gradients of the loss of each sequence with respect to a mask on the channels of the site's tap, [S, C].
        moment: second moment of the tap in blocks of channels, [C / w, w, w]: the heads of `context`, or groups of
            neighboring channels of `act`.
        rotated: gradients with respect to a mask on the directions of eigenvectors of the blocks, the leading one
            first, [S, C]; None where they were not measured.
    """

    grad: Tensor
    moment: Tensor
    rotated: Tensor | None = None

    def importance(self, rotate: bool, options: AllocationOptions) -> Tensor:
        """Return what each unit of the site is worth, [C]: the sum over the sequences of its squared gradient.

        Args:
            rotate: whether the units are the directions of the eigenvectors, the leading one of each block first
                (Eq. 11, or the gradients of masks on them); otherwise they are the channels (Eq. 10).
            options: settings.
        """
        rows, moment = self.grad, self.moment if rotate else None
        if rotate and options.rotation == "exact":
            assert self.rotated is not None, "the gradient pass was asked for them"
            rows, moment = self.rotated, None
        return channel_importance(summed_rows(rows, options.gradient_group), moment)


@dataclass(frozen=True)
class MaskGradients:
    """What the gradient pass measured.

    Attributes:
        layers: for each layer, the gradients of its sites by name.
        pair_scores: mean |q k| of each rotary pair of the dense head, summed over the query heads, [d / 2], of each
            layer; None for a layer, or for all of them, without RoPE.
    """

    layers: tuple[Mapping[str, SiteGradients], ...]
    pair_scores: tuple[Tensor | None, ...] | None = None

    def of(self, sites: ModelSites, kind: str) -> list[SiteGradients]:
        """Return the gradients of all sites of a kind, in the order of `ModelSites.of`."""
        return [self.layers[layer][site.name] for layer, site in sites.of(kind)]

    def importance(self, sites: ModelSites, kind: str, rotate: bool, options: AllocationOptions) -> list[Tensor]:
        """Return the importance of the channels of each site of a kind, [C] or [H, C / H] as they were measured.

        Args:
            sites: of the model.
            kind: of the sites.
            rotate: into the eigenvectors of the second moments; Paper: Eq. 11.
            options: of the allocation.

        Raises:
            NumericalError: the second moments of a layer, which it names, have no eigenvectors.
        """
        found = []
        for (layer, _), site in zip(sites.of(kind), self.of(sites, kind), strict=True):
            try:
                found.append(site.importance(rotate, options))
            except NumericalError as error:
                raise NumericalError(f"layer {layer}: {error}") from error
        return found


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


def summed_rows(rows_SC: Tensor, group: int) -> Tensor:
    """Return the sums of `group` consecutive rows, the last one of what is left, [ceil(S / group), C].

    E[(g_1 + ... + g_n)^2] = n (n mean^2 + variance): sums of several sequences count more of what they have in common.
    """
    return torch.stack([part.sum(0) for part in rows_SC.split(group)]) if group > 1 else rows_SC


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


def keep_ranked_together(
    importance: Mapping[str, Sequence[Tensor]], sites: ModelSites, sparsity: float, cap: float
) -> dict[str, list[float]]:
    """Return what the sites of each kind keep when the units of all kinds and layers meet one threshold.

    Args:
        importance: by kind, one tensor of unit importances a site, in the order of `ModelSites.of`.
        sites: with what counts of their weights.
        sparsity: fraction of these to remove.
        cap: largest fraction that one site may lose.
    """
    units = [unit for of_kind in importance.values() for unit in of_kind]
    sizes = [size for kind in importance for size in sites.sizes(kind)]
    kept = iter(keep_fractions(units, sizes, sparsity, cap))
    return {kind: [next(kept) for _ in of_kind] for kind, of_kind in importance.items()}


def allocate_by_head_search(
    measured: MaskGradients, sites: ModelSites, sparsity: float, options: AllocationOptions
) -> Allocation:
    """Rank whole heads and channels by squared mask gradients and search the number of heads: SoBP's first stage.

    For each number of heads that the model may keep, the best heads stay, and the best channels that fit in the rest
    of the budget; the number that keeps most importance wins. A mask on a head has the sum of its channels' gradients.
    The importance of a channel counts channel_balance times its weights over those of a head; the published search has
    250. Of attention, what counts is what goes with a query head (`Units`).
    """
    heads = [
        channel_importance(
            summed_rows(site.grad.view(len(site.grad), len(site.moment), -1).sum(2), options.gradient_group), None
        )
        for site in measured.of(sites, ATTENTION)
    ]
    channels = [site.importance(False, options) for site in measured.of(sites, FFN)]
    ranked_heads, ranked_channels = (
        torch.cat([torch.zeros(1, dtype=torch.float64), torch.cat(list(units)).sort(descending=True).values.cumsum(0)])
        for units in (heads, channels)
    )
    attention_sizes, ffn_sizes = sites.sizes(ATTENTION), sites.sizes(FFN)
    total_attention, total_ffn = sum(attention_sizes), sum(ffn_sizes)
    budget = (1.0 - sparsity) * (total_attention + total_ffn)
    balance = options.channel_balance * (total_ffn / sum(map(len, channels))) / (total_attention / sum(map(len, heads)))
    cap = options.max_site_sparsity
    best = None
    for count in range(len(ranked_heads)):
        attention = count / (len(ranked_heads) - 1)
        ffn = (budget - attention * total_attention) / total_ffn
        if not (1.0 - cap - 1e-9 <= attention and 1.0 - cap - 1e-9 <= ffn <= 1.0 + 1e-9):
            continue
        value = float(ranked_heads[count] + balance * ranked_channels[int(ffn * (len(ranked_channels) - 1))])
        if best is None or value > best[0]:
            best = (value, 1.0 - attention, 1.0 - ffn)
    # No whole number of heads leaves the FFNs a possible rest: both lose the same.
    _, attention, ffn = best or (0.0, sparsity, sparsity)
    keep = {
        ATTENTION: keep_fractions(heads, attention_sizes, attention, cap),
        FFN: keep_fractions(channels, ffn_sizes, ffn, cap),
    }
    return Allocation.of_kinds(sites, keep)


def allocate_by_mask_gradient(
    measured: MaskGradients, sites: ModelSites, sparsity: float, options: AllocationOptions
) -> Allocation:
    """Rank attention units against attention units and FFN units against FFN units over all layers."""
    attention, ffn = split_sparsity(sites, sparsity, options)
    keep = {}
    for kind, lost, rotate in ((ATTENTION, attention, options.pca_attention), (FFN, ffn, options.pca_ffn)):
        importance = measured.importance(sites, kind, rotate, options)
        keep[kind] = keep_fractions(importance, sites.sizes(kind), lost, options.max_site_sparsity)
    return Allocation.of_kinds(sites, keep)
