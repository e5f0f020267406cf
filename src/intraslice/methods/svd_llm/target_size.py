"""A size as the budget: how small two factors can make a model."""

from __future__ import annotations

from typing import Any

from intraslice.algebra.selection import MULTIPLES
from intraslice.methods.base import SizeLimits
from intraslice.methods.svd_llm.options import SvdLlmOptions
from intraslice.options import MAX_SPARSITY
from intraslice.runtime.configuration_intraslice import dense_shapes
from intraslice.runtime.families_intraslice import FamilySpec


def size_limits(config: Any, spec: FamilySpec, options: SvdLlmOptions) -> SizeLimits:
    """Return how small factors can make a model: the last rank of `plan_ranks` is rounded.

    Args:
        config: stock config of the dense model.
        spec: its family.
        options: none.
    """
    layers = [spec.linear_sizes(shape, config.hidden_size) for shape in dense_shapes(config, spec)]
    steps = [rows + columns for sizes in layers for rows, columns in sizes.values()]
    return SizeLimits(most=MAX_SPARSITY - 0.01, slack=MULTIPLES[0] * max(steps) / 2, tensors=len(steps))
