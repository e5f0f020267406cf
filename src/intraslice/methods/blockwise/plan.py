"""How much each block may lose: measures what the allocator asks for, and runs it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from intraslice.methods.blockwise.allocators import (
    Allocation,
    BlockSizes,
    ShapeGrid,
    allocate_by_fluctuation,
    allocate_by_head_search,
    allocate_by_mask_gradient,
    allocate_by_similarity,
    allocate_shapes,
    allocate_uniform,
    count_units,
)
from intraslice.methods.blockwise.gradient_pass import SCAN_VERSION, scan_mask_gradients
from intraslice.methods.blockwise.options import MethodOptions
from intraslice.methods.blockwise.profile_pass import profile_layers
from intraslice.options import RunOptions
from intraslice.progress import Progress
from intraslice.streaming.hidden import embedded_states
from intraslice.streaming.model import StreamedModel

_BY_PROFILE = {"fluctuation": allocate_by_fluctuation, "similarity": allocate_by_similarity}
_BY_MASK_GRADIENT = {"mask_gradient": allocate_by_mask_gradient, "head_search": allocate_by_head_search}


def reads_gradients(method: MethodOptions) -> bool:
    """Return whether there is a gradient pass."""
    asks = method.architecture == "block" and method.allocation.name in _BY_MASK_GRADIENT
    return asks and method.sparsity > 0


def kept_scan_path(folder: Path, identity: dict[str, Any], method: MethodOptions) -> Path:
    """Return the file of a gradient pass: named by everything that decides it, and nothing else."""
    decides = {name: identity[name] for name in ("model", "device", "batch_tokens", "compute", "matmul")}
    decides["tokens"] = identity["calibration"]["fingerprint"]
    decides["num_ffn_blocks"] = method.allocation.num_ffn_blocks
    decides["version"] = SCAN_VERSION
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return folder / f"scan-{digest[:32]}.safetensors"


def allocate(
    model: StreamedModel,
    sizes: BlockSizes,
    tokens_NT: Tensor,
    method: MethodOptions,
    run: RunOptions,
    *,
    batch: int,
    scan_path: Path,
    hidden_path: Path,
    progress: Progress,
) -> Allocation:
    """Return what each block keeps, by the allocator that the options name.

    Args:
        model: the streamed dense model.
        sizes: dense linear weights of the blocks.
        tokens_NT: calibration token ids, [N, T].
        method: what decides the weights.
        run: where and how.
        batch: sequences in one forward batch.
        scan_path: file that holds the gradient pass.
        hidden_path: file for the hidden states of a forward pass, when they are kept on disk.
        progress: shows the passes.

    Raises:
        BudgetError: the sparsity cannot be reached under the cap.
        NumericalError: activations or gradients are NaN or infinite.
    """
    options, shape = method.allocation, model.dense_shape
    units = count_units(
        sizes,
        method.sparsity,
        options,
        num_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
    )
    grid = _shape_grid(model, method)
    if options.name == "uniform" or method.sparsity == 0:
        return units.weigh(allocate_uniform(units.sizes, units.sparsity, options))
    if options.name in _BY_PROFILE:
        hidden = embedded_states(model, tokens_NT, batch, hidden_path if run.hidden_states == "disk" else None)
        profile = profile_layers(model, hidden, progress)
        return units.weigh(_BY_PROFILE[options.name](profile, units.sizes, units.sparsity, options))
    scores = scan_mask_gradients(
        model,
        tokens_NT,
        batch=batch,
        boundary_bytes=run.boundary_bytes,
        num_ffn_blocks=options.num_ffn_blocks,
        save_path=scan_path,
        progress=progress,
    )
    if grid is None:
        return units.weigh(_BY_MASK_GRADIENT[options.name](scores, units.sizes, units.sparsity, options))
    allocation = allocate_shapes(scores, sizes, method.sparsity, options, grid)
    progress.note(
        f"allocation.shapes = {options.shapes} keeps {allocation.kept_importance:.1%} of the channels' importance; "
        f"free shapes would keep {allocation.free_importance:.1%}"
    )
    return allocation


def _shape_grid(model: StreamedModel, method: MethodOptions) -> ShapeGrid | None:
    """Return the shapes that the options allow, or None when they are free."""
    if method.allocation.shapes == "free":
        return None
    attention, head_dim = method.attention, model.dense_shape.qk_head_dim
    least = max(attention.head_multiple, attention.min_head_fraction * head_dim)
    widths = [w for w in range(attention.head_multiple, head_dim, attention.head_multiple) if w >= least]
    if not attention.adaptive_heads or (method.allocation.shapes != "layer" and not model.can_share_pairs):
        widths = []
    return ShapeGrid(
        num_key_value_heads=model.dense_shape.num_key_value_heads,
        hidden_size=model.config.hidden_size,
        num_ffn_matrices=model.spec.num_ffn_matrices,
        widths=(*widths, head_dim),
        context_multiple=attention.context_multiple,
        ffn_multiple=method.ffn.ffn_multiple,
        heads_divide_hidden=method.allocation.shapes == "model" and model.heads_divide_hidden,
    )
