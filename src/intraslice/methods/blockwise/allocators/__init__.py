"""Global allocation: how many linear weights each attention and FFN block may keep. Pure tensors."""

from __future__ import annotations

from intraslice.methods.blockwise.allocators.base import Allocation, BlockSizes, count_units
from intraslice.methods.blockwise.allocators.mask_gradient import (
    MaskScores,
    allocate_by_head_search,
    allocate_by_mask_gradient,
)
from intraslice.methods.blockwise.allocators.profile import (
    LayerProfile,
    allocate_by_fluctuation,
    allocate_by_similarity,
)
from intraslice.methods.blockwise.allocators.shapes import ShapeGrid, allocate_shapes
from intraslice.methods.blockwise.allocators.uniform import allocate_uniform

__all__ = [
    "Allocation",
    "BlockSizes",
    "LayerProfile",
    "MaskScores",
    "ShapeGrid",
    "allocate_by_fluctuation",
    "allocate_by_head_search",
    "allocate_by_mask_gradient",
    "allocate_by_similarity",
    "allocate_shapes",
    "allocate_uniform",
    "count_units",
]
