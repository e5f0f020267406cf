"""What every allocator returns, and how the budget is split between attention and FFN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from intraslice.errors import BudgetError
from intraslice.options import AllocationOptions


@dataclass(frozen=True)
class BlockSizes:
    """Dense linear weights of each layer's attention and FFN block."""

    attention: tuple[int, ...]
    ffn: tuple[int, ...]


@dataclass(frozen=True)
class Allocation:
    """Fractions of its linear weights that each block keeps, in (0, 1]."""

    attention: tuple[float, ...]
    ffn: tuple[float, ...]

    def to_dict(self) -> dict[str, list[float]]:
        """Return plain JSON types."""
        return {"attention": list(self.attention), "ffn": list(self.ffn)}

    @classmethod
    def from_dict(cls, data: dict[str, Sequence[float]]) -> Allocation:
        """Inverse of `to_dict`."""
        return cls(tuple(data["attention"]), tuple(data["ffn"]))


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
