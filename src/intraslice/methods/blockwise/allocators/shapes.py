"""Shapes that a runtime can run, chosen inside the same budget.

Some runtimes want one group size per layer, one head width for all layers, or one shape for the whole model. Rounding a
free allocation afterwards would waste budget or quality, so the shapes themselves are chosen: every block has a list of
shapes it may take, each with a cost (weights) and a value (the importance of the channels it keeps), and the choice of
largest total value within the budget wins.

lambda_b says how attention and FFN share the loss when shapes are free. The marginal values there give the rate at
which importance of attention channels is exchanged against importance of FFN channels, so that both can compete.

Shapes: L layers, H query heads, K kv heads, d head_dim, F intermediate_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intraslice.algebra.selection import TOLERANCE, HeadPlan, top_indices
from intraslice.errors import BudgetError
from intraslice.layers.sites import ATTENTION, FFN, ModelSites
from intraslice.methods.blockwise.allocators.base import Allocation, split_sparsity
from intraslice.methods.blockwise.allocators.mask_gradient import MaskGradients
from intraslice.methods.blockwise.options import AllocationOptions

NEAR = 0.9 * TOLERANCE
"""How near to the budget one shape for all layers must come: closer than what a finished prune may miss it by."""


@dataclass(frozen=True, kw_only=True)
class ShapeGrid:
    """What shapes are allowed, and what they cost.

    Attributes:
        num_key_value_heads: K of the dense model; the dense shape is always allowed.
        hidden_size: D.
        num_ffn_matrices: 2 or 3; a channel costs hidden_size weights in each.
        widths: head widths, ascending; the last one is d.
        context_multiple: query heads times width are a multiple of this.
        ffn_multiple: kept channels are a multiple of this.
        heads_divide_hidden: whether the number of query heads must divide hidden_size.
    """

    num_key_value_heads: int
    hidden_size: int
    num_ffn_matrices: int
    widths: tuple[int, ...]
    context_multiple: int = 1
    ffn_multiple: int = 1
    heads_divide_hidden: bool = False


@dataclass(frozen=True)
class _Choice:
    """One shape of a block: a HeadPlan or a number of channels, its weights and its value."""

    shape: HeadPlan | int
    cost: int
    value: float


def allocate_shapes(
    measured: MaskGradients, sites: ModelSites, sparsity: float, options: AllocationOptions, grid: ShapeGrid
) -> Allocation:
    """Choose the shape of every site under `options.shape_freedom`: "layer", "width" or "model".

    Args:
        measured: by the gradient pass.
        sites: all sites of the dense model.
        sparsity: fraction of all of them to remove.
        options: settings.
        grid: the shapes that are allowed.

    Raises:
        BudgetError: no allowed shapes come near the sparsity.
    """
    heads, channels = _importance(measured, sites, options)
    attention_sizes, ffn_sizes = sites.sizes(ATTENTION), sites.sizes(FFN)
    rate, free_value = _exchange_rate(heads, channels, sites, sparsity, options)
    heads = [rate * layer for layer in heads]
    total = float(sum(layer.sum() for layer in (*heads, *channels)))
    budget = (1.0 - sparsity) * sites.num_weights
    cap = options.max_site_sparsity
    ffn = [_ffn_choices(layer, grid, cap) for layer in channels]
    rotated, mass = _pair_mass(measured)
    candidates = []
    for widths in [grid.widths] if options.shape_freedom == "layer" else [(width,) for width in grid.widths]:
        pairs = None if options.shape_freedom == "layer" or mass is None else _shared_pairs(mass, widths[0])
        # Layers without RoPE are free in what they keep of query and key, whatever the others share.
        kept_mass = [1.0] * len(heads)
        if pairs is not None and mass is not None:
            # Sites that go as a whole are not among those that get a shape.
            places = {layer: place for place, (layer, _) in enumerate(sites.of(ATTENTION))}
            for layer, kept in zip(rotated, mass[:, list(pairs)].sum(1).tolist(), strict=True):
                if layer in places:
                    kept_mass[places[layer]] = kept
        attention = [
            _head_choices(layer * kept, grid, widths, size, cap)
            for layer, kept, size in zip(heads, kept_mass, attention_sizes, strict=True)
        ]
        if not all(attention):
            continue
        if options.shape_freedom == "model":
            chosen = _one_shape(attention, ffn, budget, NEAR * sites.num_weights)
        else:
            chosen = knapsack(attention + ffn, budget)
        if chosen is not None:
            candidates.append((sum(choice.value for choice in chosen), chosen, pairs))
    if not candidates:
        raise BudgetError(
            f"no shapes that allocation.shape_freedom = {options.shape_freedom} allows remove {sparsity:g} of the "
            "weights; change the sparsity or choose finer multiples with --align."
        )
    value, chosen, pairs = max(candidates, key=lambda candidate: candidate[0])
    blocks = len(heads)
    everything = pairs is None or mass is None or len(pairs) == mass.shape[1]
    keep = {
        ATTENTION: [choice.cost / size for choice, size in zip(chosen[:blocks], attention_sizes, strict=True)],
        FFN: [choice.cost / size for choice, size in zip(chosen[blocks:], ffn_sizes, strict=True)],
    }
    return Allocation.of_kinds(
        sites,
        keep,
        heads=tuple(choice.shape for choice in chosen[:blocks] if isinstance(choice.shape, HeadPlan)),
        rope_pairs=None if everything else pairs,
        kept_importance=value / total,
        free_importance=free_value / total,
    )


def _importance(
    measured: MaskGradients, sites: ModelSites, options: AllocationOptions
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the importance of head channels [H, d], in the order in which they would be kept, and of channels [F]."""
    heads = []
    worth = measured.importance(sites, ATTENTION, options.pca_attention, options)
    for site, flat in zip(measured.of(sites, ATTENTION), worth, strict=True):
        importance = flat.view(len(site.moment), -1)
        heads.append(importance if options.pca_attention else importance.sort(1, descending=True).values)
    return heads, measured.importance(sites, FFN, options.pca_ffn, options)


def _exchange_rate(
    heads: Sequence[Tensor],
    channels: Sequence[Tensor],
    sites: ModelSites,
    sparsity: float,
    options: AllocationOptions,
) -> tuple[float, float]:
    """Return what attention importance is worth in FFN importance, and the value that free shapes would keep."""

    def threshold(importance: Sequence[Tensor], weights: int, lost: float) -> tuple[float, float]:
        """Return the importance per weight of the last unit that goes, and the sum of what stays."""
        units = torch.cat([layer.flatten() for layer in importance]).sort().values
        removed = min(round(lost * len(units)), len(units) - 1)
        return float(units[removed]) * len(units) / weights, float(units[removed:].sum())

    attention_lost, ffn_lost = split_sparsity(sites, sparsity, options)
    attention_margin, attention_kept = threshold(heads, sum(sites.sizes(ATTENTION)), attention_lost)
    ffn_margin, ffn_kept = threshold(channels, sum(sites.sizes(FFN)), ffn_lost)
    rate = ffn_margin / max(attention_margin, 1e-30)
    return rate, rate * attention_kept + ffn_kept


def _pair_mass(measured: MaskGradients) -> tuple[list[int], Tensor | None]:
    """Return the layers with RoPE, R of them, and the share of each pair in their mean |q k|, [R, d / 2] or None."""
    found = {layer: scores for layer, scores in enumerate(measured.pair_scores or ()) if scores is not None}
    if not found:
        return [], None
    mass = torch.stack(list(found.values()))
    return list(found), mass / mass.sum(1, keepdim=True).clamp_min(1e-30)


def _shared_pairs(mass_RP: Tensor, width: int) -> tuple[int, ...]:
    return tuple(top_indices(mass_RP.sum(0), width // 2).tolist())


def _head_choices(
    importance_Hd: Tensor, grid: ShapeGrid, widths: Sequence[int], size: int, cap: float
) -> list[_Choice]:
    """Return every allowed (kv heads, group size, width) with the importance of the best heads of that number."""
    num_heads, head_dim = importance_Hd.shape
    kv_heads = grid.num_key_value_heads
    full_group = num_heads // kv_heads
    up_to = importance_Hd.cumsum(1)
    choices = []
    for width in widths:
        # Best heads first within a group, then best groups first: sums of the first ones are what a choice keeps.
        members = up_to[:, width - 1].view(kv_heads, full_group).sort(1, descending=True).values.cumsum(1)
        groups = members.sort(0, descending=True).values.cumsum(0)  # [K, G]
        for group in range(1, full_group + 1):
            for kv in range(1, kv_heads + 1):
                heads = kv * group
                dense = (kv, group, width) == (kv_heads, full_group, head_dim)
                aligned = heads * width % grid.context_multiple == 0
                divides = not grid.heads_divide_hidden or grid.hidden_size % heads == 0
                cost = 2 * grid.hidden_size * width * (heads + kv)
                if dense or (aligned and divides and cost >= (1.0 - cap) * size):
                    plan = HeadPlan(num_key_value_heads=kv, group=group, width=width)
                    choices.append(_Choice(plan, cost, float(groups[kv - 1, group - 1])))
    return choices


def _ffn_choices(importance_F: Tensor, grid: ShapeGrid, cap: float) -> list[_Choice]:
    width = importance_F.shape[0]
    kept = importance_F.sort(descending=True).values.cumsum(0)
    least = -(-int((1.0 - cap) * width) // grid.ffn_multiple) * grid.ffn_multiple
    steps = [*range(max(least, grid.ffn_multiple), width, grid.ffn_multiple), width]
    per_channel = grid.hidden_size * grid.num_ffn_matrices
    return [_Choice(channels, channels * per_channel, float(kept[channels - 1])) for channels in steps]


def knapsack(blocks: Sequence[Sequence[_Choice]], budget: float) -> list[_Choice] | None:
    """Return one choice of each block with the largest total value whose cost stays within the budget, nearly.

    A price per weight is searched at which the best choices fit the budget; what is then left is spent on the steps
    of best value per weight. None when even the cheapest choices are too expensive.
    """

    def best(price: float) -> list[_Choice]:
        return [max(choices, key=lambda c: (c.value - price * c.cost, -c.cost)) for choices in blocks]

    def cost(chosen: Sequence[_Choice]) -> int:
        return sum(choice.cost for choice in chosen)

    cheapest = [min(choices, key=lambda c: c.cost) for choices in blocks]
    if cost(cheapest) > budget:
        return None
    low, high = 0.0, max(choice.value / choice.cost for choices in blocks for choice in choices) + 1e-30
    while cost(best(high)) > budget:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(best(middle)) <= budget else (middle, high)
    chosen = best(high)
    left = budget - cost(chosen)
    while True:
        steps = [
            ((choice.value - chosen[block].value) / (choice.cost - chosen[block].cost), block, choice)
            for block, choices in enumerate(blocks)
            for choice in choices
            if 0 < choice.cost - chosen[block].cost <= left and choice.value >= chosen[block].value
        ]
        if not steps:
            return chosen
        _, block, choice = max(steps, key=lambda step: step[0])
        left -= choice.cost - chosen[block].cost
        chosen[block] = choice


def _one_shape(
    attention: Sequence[Sequence[_Choice]], ffn: Sequence[Sequence[_Choice]], budget: float, tolerance: float
) -> list[_Choice] | None:
    """Return one choice for all layers: each attention shape is tried, the FFN takes what is nearest to the rest."""
    layers = len(attention)
    found = None
    for number in range(len(attention[0])):
        heads = [choices[number] for choices in attention]
        wanted = (budget - sum(choice.cost for choice in heads)) / layers
        nearest = min(range(len(ffn[0])), key=lambda step: abs(ffn[0][step].cost - wanted))
        chosen = heads + [choices[nearest] for choices in ffn]
        cost, value = sum(choice.cost for choice in chosen), sum(choice.value for choice in chosen)
        if abs(cost - budget) <= tolerance and (found is None or value > found[0]):
            found = (value, chosen)
    return None if found is None else found[1]
