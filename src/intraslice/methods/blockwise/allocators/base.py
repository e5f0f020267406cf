"""What every allocator returns, and how the budget is split between attention and FFN."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from intraslice.algebra.selection import HeadPlan
from intraslice.errors import BudgetError
from intraslice.methods.blockwise.options import AllocationOptions


@dataclass(frozen=True)
class BlockSizes:
    """Dense linear weights of each layer's attention and FFN block."""

    attention: tuple[int, ...]
    ffn: tuple[int, ...]


@dataclass(frozen=True)
class Allocation:
    """What each block keeps.

    Attributes:
        attention, ffn: fractions of the block's linear weights, in (0, 1].
        heads: exact shapes of the attention blocks, where a runtime asks for them; the fractions are then theirs.
        rope_pairs: rotary pairs that all heads of all layers keep; None leaves the choice to each kv head.
        kept_importance: share of the importance of all channels that these shapes keep.
        free_importance: the share that free shapes would have kept.
    """

    attention: tuple[float, ...]
    ffn: tuple[float, ...]
    heads: tuple[HeadPlan, ...] | None = None
    rope_pairs: tuple[int, ...] | None = None
    kept_importance: float | None = None
    free_importance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Allocation:
        """Inverse of `to_dict`, also after a way through JSON."""
        heads, pairs = data["heads"], data["rope_pairs"]
        return cls(
            tuple(data["attention"]),
            tuple(data["ffn"]),
            None if heads is None else tuple(HeadPlan(**plan) for plan in heads),
            None if pairs is None else tuple(pairs),
            data["kept_importance"],
            data["free_importance"],
        )


@dataclass(frozen=True)
class Units:
    """Blocks measured in what an allocator may remove.

    Whole-head methods take query heads; the kv heads of grouped queries stay behind. Shares of the query heads' weights
    keep a head worth its own weights against a channel, and "the same share everywhere" the same share of heads.

    Attributes:
        sizes: weights of the units of each block.
        sparsity: fraction of all units to remove, for the sparsity that was asked for.
        query_share: what part of an attention block its units are.
        num_heads: units of an attention block; None when weights are the units.
    """

    sizes: BlockSizes
    sparsity: float
    query_share: float = 1.0
    num_heads: int | None = None

    def weigh(self, allocation: Allocation) -> Allocation:
        """Return an allocation of units as fractions of the blocks' weights.

        The number of query heads that go is rounded down, as in the published codes; the layer's FFN makes up for it.
        """
        if self.num_heads is None:
            return allocation
        attention, ffn = [], []
        for kept, ffn_kept, size, ffn_size in zip(
            allocation.attention, allocation.ffn, self.sizes.attention, self.sizes.ffn, strict=True
        ):
            # What an allocator spreads over all blocks, so that the budget is met exactly, must not cost a head.
            whole = 1.0 - math.floor(self.num_heads * (1.0 - kept) + 0.05) / self.num_heads
            attention.append(1.0 - self.query_share * (1.0 - whole))
            ffn.append(ffn_kept - (whole - kept) * size / ffn_size)
        return replace(allocation, attention=tuple(attention), ffn=tuple(ffn))


def count_units(
    sizes: BlockSizes, sparsity: float, options: AllocationOptions, *, num_heads: int, num_key_value_heads: int
) -> Units:
    """Return the blocks in what `options.count` counts.

    Args:
        sizes: dense linear weights of the blocks.
        sparsity: fraction of all of them to remove.
        options: settings.
        num_heads: query heads of a layer.
        num_key_value_heads: kv heads of a layer.

    Raises:
        BudgetError: the sparsity cannot be reached under the cap.
    """
    share = 1.0
    if options.count == "units" and num_heads > num_key_value_heads:  # without groups the kv head goes as well
        share = num_heads / (num_heads + num_key_value_heads)
    dense = sum(sizes.attention) + sum(sizes.ffn)
    units = BlockSizes(tuple(round(share * size) for size in sizes.attention), sizes.ffn)
    of_units = sparsity * dense / (sum(units.attention) + sum(units.ffn))
    cap = options.max_block_sparsity
    if of_units > cap:
        raise BudgetError(
            f"sparsity {sparsity:g} cannot be reached: a block may lose at most {cap:.0%} of its {options.count}; "
            "lower --sparsity or raise allocation.max_block_sparsity."
        )
    return Units(units, of_units, share, num_heads if options.count == "units" else None)


def split_sparsity(sizes: BlockSizes, sparsity: float, options: AllocationOptions) -> tuple[float, float]:
    """Return (attention sparsity, FFN sparsity) whose weighted sum is the target.

    The FFN loses lambda_b * sparsity of its weights (section 3.3), attention what is left to lose. Where that would
    pass the cap of one of them, or ask for less than nothing, the other one takes the rest.
    """
    total_attention, total_ffn = sum(sizes.attention), sum(sizes.ffn)
    remove = sparsity * (total_attention + total_ffn)
    cap = options.max_block_sparsity
    ffn = min(options.ffn_bias * sparsity, cap, remove / total_ffn)
    attention = min((remove - ffn * total_ffn) / total_attention, cap)
    return max(attention, 0.0), (remove - attention * total_attention) / total_ffn
