"""Zero-padded checkpoints: any plan as a stock model, exact, without the gain in size and speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from intraslice.checkpoint.pruned import PrunedCheckpoint
from intraslice.errors import UnsupportedModelError
from intraslice.exporters.options import ExportOptions, ExportReport
from intraslice.exporters.padding import padding_cost
from intraslice.exporters.stock import stock_config, write_stock
from intraslice.progress import Progress
from intraslice.runtime.families_intraslice import LayerShape


def export_padded(
    checkpoint: PrunedCheckpoint, output: Path, options: ExportOptions, progress: Progress
) -> ExportReport:
    """Write a checkpoint as the stock class of its family, every layer scattered into one larger shape with zeros.

    Args:
        checkpoint: the pruned checkpoint.
        output: folder to write.
        options: `pad_to` names the shape: "dense" always exists, "max" keeps a part of the gain.
        progress: shows the layers.
    """
    shape, pairs = checkpoint.dense_shape, None
    if options.pad_to == "max":
        shape, pairs = _largest(checkpoint)
    shapes = (shape,) * checkpoint.num_layers
    gain = padding_cost(checkpoint, shapes)
    notes = (
        f"padding with zeros gives the decoder layers {gain:+.1%} weights; {shape.num_attention_heads} heads, "
        f"{shape.num_key_value_heads} kv heads, head_dim {shape.qk_head_dim}, FFN {shape.intermediate_size}.",
    )
    return write_stock(checkpoint, shape, pairs, output, options, progress, to="padded", notes=notes)


def _largest(checkpoint: PrunedCheckpoint) -> tuple[LayerShape, Sequence[int] | None]:
    """Return the smallest stock shape that holds all layers, and its rotary pairs (None: those of the dense head)."""
    shapes, dense = checkpoint.shapes, checkpoint.dense_shape
    group = max(max(shape.heads_per_kv, default=0) for shape in shapes)
    kv_heads = max(shape.num_key_value_heads for shape in shapes)
    pairs = checkpoint.shared_pairs()
    width = max(max(shape.qk_head_dim, shape.v_head_dim) for shape in shapes)
    if any(checkpoint.rotated) and (pairs is None or width != 2 * len(pairs)):
        # Heads that keep different pairs have room for all of them only in a head of the dense width.
        width, pairs = dense.qk_head_dim, None
    largest = LayerShape(
        heads_per_kv=(group,) * kv_heads,
        qk_head_dim=width,
        v_head_dim=width,
        intermediate_size=max(shape.intermediate_size for shape in shapes),
    )
    try:
        stock_config(checkpoint, largest, pairs)
    except UnsupportedModelError:
        heads = LayerShape(
            heads_per_kv=dense.heads_per_kv,
            qk_head_dim=dense.qk_head_dim,
            v_head_dim=dense.v_head_dim,
            intermediate_size=largest.intermediate_size,
        )
        return heads, None
    return largest, pairs
