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

    The FFN loses lambda_b * sparsity of its weights (section 3.3); attention loses what is left to lose.

    Raises:
        BudgetError: one of them would pass the cap on a block.
    """
    total_attention, total_ffn = sum(sizes.attention), sum(sizes.ffn)
    ffn = options.ffn_bias * sparsity
    attention = (sparsity * (total_attention + total_ffn) - ffn * total_ffn) / total_attention
    cap = options.max_block_sparsity
    for name, value in (("attention", attention), ("FFN", ffn)):
        if not -1e-9 <= value <= cap:
            raise BudgetError(
                f"sparsity {sparsity:g} with ffn_bias {options.ffn_bias:g} asks the {name} blocks to lose "
                f"{value:.1%}, but a block may lose between 0 and {cap:.0%}; lower --sparsity, or set "
                "allocation.ffn_bias nearer to 1, or raise allocation.max_block_sparsity."
            )
    return max(attention, 0.0), ffn
