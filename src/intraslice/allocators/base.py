"""What every allocator returns, and how the budget is split between attention and FFN."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from intraslice.errors import BudgetError
from intraslice.options import AllocationOptions
from intraslice.selection import HeadPlan


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


def split_sparsity(sizes: BlockSizes, sparsity: float, options: AllocationOptions) -> tuple[float, float]:
    """Return (attention sparsity, FFN sparsity) whose weighted sum is the target.

    The FFN loses lambda_b * sparsity of its weights (section 3.3), attention what is left to lose. Where that would
    pass the cap of one of them, or ask for less than nothing, the other one takes the rest.

    Raises:
        BudgetError: even both together cannot lose so much under the cap.
    """
    total_attention, total_ffn = sum(sizes.attention), sum(sizes.ffn)
    remove = sparsity * (total_attention + total_ffn)
    cap = options.max_block_sparsity
    if sparsity > cap:
        raise BudgetError(
            f"sparsity {sparsity:g} cannot be reached: a block may lose at most {cap:.0%} of its weights; lower "
            "--sparsity or raise allocation.max_block_sparsity."
        )
    ffn = min(options.ffn_bias * sparsity, cap, remove / total_ffn)
    attention = min((remove - ffn * total_ffn) / total_attention, cap)
    return max(attention, 0.0), (remove - attention * total_attention) / total_ffn
