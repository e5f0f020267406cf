"""The same sparsity in every layer."""

from __future__ import annotations

from intraslice.methods.blockwise.allocators.base import Allocation, BlockSizes, split_sparsity
from intraslice.methods.blockwise.options import AllocationOptions


def allocate_uniform(sizes: BlockSizes, sparsity: float, options: AllocationOptions) -> Allocation:
    """Give each attention block and each FFN block the same sparsity."""
    attention, ffn = split_sparsity(sizes, sparsity, options)
    return Allocation((1.0 - attention,) * len(sizes.attention), (1.0 - ffn,) * len(sizes.ffn))
