"""Global allocation: how many linear weights each attention and FFN block may keep. Pure tensors."""

from __future__ import annotations

from intraslice.allocators.base import Allocation, BlockSizes, count_units
from intraslice.allocators.mask_gradient import MaskScores, allocate_by_head_search, allocate_by_mask_gradient
from intraslice.allocators.profile import LayerProfile, allocate_by_fluctuation, allocate_by_similarity
from intraslice.allocators.shapes import ShapeGrid, allocate_shapes
from intraslice.allocators.uniform import allocate_uniform

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
