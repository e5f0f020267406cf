"""A size as the budget: how small block-wise methods can make a model, and what they add to its linear weights."""

from __future__ import annotations

from typing import Any

from intraslice.layers.sites import ATTENTION, FFN, ModelSites, layer_sites
from intraslice.methods.base import SizeLimits
from intraslice.methods.blockwise.allocators.shapes import NEAR
from intraslice.methods.blockwise.options import BlockwiseOptions
from intraslice.methods.blockwise.strategies import REPAIRS
from intraslice.options import MAX_SPARSITY
from intraslice.runtime.configuration_intraslice import dense_shapes
from intraslice.runtime.families_intraslice import FamilySpec

_INDEX_BYTES = 8


def size_limits(config: Any, spec: FamilySpec, options: BlockwiseOptions) -> SizeLimits:
    """Return how small a model can become, and what is added.

    Args:
        config: stock config of the dense model.
        spec: its family.
        options: of the method.
    """
    shapes, hidden = dense_shapes(config, spec), config.hidden_size
    sites = ModelSites(tuple(layer_sites(spec, shape, hidden) for shape in shapes))
    steps = [options.ffn.ffn_multiple * site.unit_weights for _, site in sites.of(FFN)]
    # The account ends within half a step of the FFN; one shape for all layers comes only near to the budget.
    slack = max(steps, default=0) / 2
    if options.allocation.shape_freedom == "model":
        slack += NEAR * sites.num_weights
    share = 1.0
    if options.allocation.budget_unit == "units":
        share = sum(site.units * site.unit_weights for layer in sites.layers for site in layer) / sites.num_weights
    # The kept pairs of each kv head, and the place of each head in ragged groups.
    indices = [shape.num_key_value_heads * shape.qk_head_dim // 2 + shape.num_attention_heads for shape in shapes]
    repairs = {ATTENTION: options.attention.repair, FFN: options.ffn.repair}
    biased = any(REPAIRS[repair].adds_bias for repair in repairs.values())
    # A layer has both biases or none.
    added = 2 * hidden * len(shapes) if biased else 0
    if spec.qk_norm is not None:
        # Narrow heads may have norms of their own.
        heads = (shape.num_attention_heads + shape.num_key_value_heads for shape in shapes)
        added += sum(count * shape.qk_head_dim for count, shape in zip(heads, shapes, strict=True))
    return SizeLimits(
        most=min(options.allocation.max_site_sparsity * share, MAX_SPARSITY - 0.01),
        slack=slack,
        parameters=added,
        index_bytes=_INDEX_BYTES * sum(indices),
        tensors=(4 if biased else 2) * len(shapes),
    )
