"""What a GGUF file holds in an architecture of llama.cpp that has one shape for all layers.

These architectures have norms of query and key, norms of outputs, windows and caps of their own. Layers of different
shapes are zero-padded to the smallest shape that holds them all, which is exact. Heads have the dense width, because
there is no place for a choice of rotary pairs.

Shapes: W head width, of the file as of the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from intraslice.checkpoint.pruned import PrunedCheckpoint
from intraslice.checkpoint.reader import build_skeleton
from intraslice.errors import UnsupportedModelError
from intraslice.exporters.gguf_plan import (
    FilePlan,
    check_activation,
    context_length,
    matrix_dtype,
    quantisation_notes,
    windowed_layers,
)
from intraslice.exporters.options import ExportOptions
from intraslice.exporters.padding import padding_cost
from intraslice.runtime.configuration_intraslice import rotary_dim
from intraslice.runtime.families_intraslice import LayerShape, LlamaCpp

_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_WINDOWED, _FULL = "sliding_attention", "full_attention"


def plan_one_shape(checkpoint: PrunedCheckpoint, known: LlamaCpp, options: ExportOptions) -> FilePlan:
    """Decide what a file with one shape for all layers will hold.

    Args:
        checkpoint: the pruned checkpoint.
        known: the architecture, as the row of its family describes it.
        options: of the export.

    Raises:
        UnsupportedModelError: llama.cpp has no place for what the model does.
    """
    where = f"llama.cpp's architecture {known.architecture!r}"
    check_activation(checkpoint, known.activations, where)
    _check_norms(checkpoint, known, where)
    _check_biases(checkpoint, where)
    values = vars(checkpoint.dense)
    if known.head == "tied" and not values["tie_word_embeddings"]:
        raise _lacks(checkpoint, where, "an output matrix besides the embedding")
    shape = _largest(checkpoint, known)
    width, shapes = shape.qk_head_dim, (shape,) * checkpoint.num_layers
    windowed = windowed_layers(checkpoint)
    base, keys = _rope(checkpoint, windowed, where)
    keys += _caps(checkpoint, known, where)
    context, notes = context_length(checkpoint)
    if known.windows:
        context, notes = int(values["max_position_embeddings"]), []
        keys += _windows(checkpoint, windowed, where)
    notes += _padding_notes(checkpoint, known, shapes) + quantisation_notes(shapes, width)
    return FilePlan(
        architecture=known.architecture,
        shapes=shapes,
        pairs=None,
        row_order=torch.arange(width),
        rope_factors=None,
        rope_base=base,
        query_scale=_query_scale(checkpoint, known, shape),
        context_length=context,
        dtype=matrix_dtype(checkpoint, options),
        notes=tuple(notes),
        keys=tuple(keys),
        own_head=known.head == "own",
    )


def _lacks(checkpoint: PrunedCheckpoint, where: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{checkpoint.name!r} cannot be exported to GGUF: {where} has no {what}; load the checkpoint with transformers "
        "or vLLM instead"
    )


def _check_norms(checkpoint: PrunedCheckpoint, known: LlamaCpp, where: str) -> None:
    if any(shape.headed_qk_norm for shape in checkpoint.shapes):
        way = "attention.qk_width = dense" if known.fills_hidden else "--target llama.cpp or attention.qk_width = dense"
        raise UnsupportedModelError(
            f"{checkpoint.name!r} cannot be exported to GGUF: its heads keep different channels of query and key, so "
            f"that their norms differ, and {where} has one norm for all heads; prune with {way}"
        )


def _check_biases(checkpoint: PrunedCheckpoint, where: str) -> None:
    if checkpoint.has_output_biases:
        raise UnsupportedModelError(
            f"{checkpoint.name!r} cannot be exported to GGUF: the repair has put biases on o_proj and down_proj, for "
            f"which {where} has no place; prune with a method whose repair adds none"
        )
    layer = checkpoint.load_layer(0)
    found = [name for name in "qkvo" if getattr(layer.attention, f"{name}_bias") is not None]
    found += [name for name in ("gate", "up", "down") if getattr(layer.ffn, f"{name}_bias") is not None]
    if found:
        raise _lacks(checkpoint, where, f"biases of {', '.join(found)}")


def _largest(checkpoint: PrunedCheckpoint, known: LlamaCpp) -> LayerShape:
    """Return the smallest shape with heads of the dense width that holds all layers."""
    shapes, dense = checkpoint.shapes, checkpoint.dense_shape
    kv_heads = max(max(shape.num_key_value_heads for shape in shapes), 1)
    group = max(max(shape.heads_per_kv, default=1) for shape in shapes)
    return LayerShape(
        heads_per_kv=dense.heads_per_kv if known.fills_hidden else (group,) * kv_heads,
        qk_head_dim=dense.qk_head_dim,
        v_head_dim=dense.v_head_dim,
        intermediate_size=max(max(shape.intermediate_size for shape in shapes), 1),
    )


def _rope(checkpoint: PrunedCheckpoint, windowed: Sequence[bool], where: str) -> tuple[float, list[tuple[str, Any]]]:
    """Return the base of the angles, and the keys for whatever else is to be said of them."""
    given = vars(checkpoint.dense)["rope_parameters"]
    rope = {kind: given.get(kind, given) for kind in (_FULL, _WINDOWED)}
    if not all(checkpoint.rotated):
        raise _lacks(checkpoint, where, "layers without rotary embedding")
    if rotary_dim(checkpoint.dense) != checkpoint.dense_shape.qk_head_dim:
        raise _lacks(checkpoint, where, "heads that are rotated in part")
    keys: list[tuple[str, Any]] = []
    if _FULL in given:
        keys.append(("add_rope_freq_base_swa", float(rope[_WINDOWED]["rope_theta"])))
    used = {_WINDOWED if window else _FULL for window in windowed}
    for kind in sorted(used):
        # In windows the angles are those of the base: llama.cpp scales none there.
        allowed = ("default", "linear") if kind == _FULL else ("default",)
        if (found := rope[kind].get("rope_type", "default")) not in allowed:
            raise _lacks(checkpoint, where, f"rotary embedding of type {found!r} in layers with {kind}")
    if _FULL in used and rope[_FULL].get("rope_type") == "linear":
        from gguf import RopeScalingType

        keys += [
            ("add_rope_scaling_type", RopeScalingType.LINEAR),
            ("add_rope_scaling_factor", float(rope[_FULL]["factor"])),
        ]
    return float(rope[_FULL]["rope_theta"]), keys


def _caps(checkpoint: PrunedCheckpoint, known: LlamaCpp, where: str) -> list[tuple[str, Any]]:
    keys: list[tuple[str, Any]] = []
    for name in _CAPS:
        cap = vars(checkpoint.dense).get(name)
        if name in known.caps and cap is not None:
            keys.append((f"add_{name}", float(cap)))
        elif name in known.caps:
            raise _lacks(checkpoint, where, f"way to leave {name} out")
        elif cap is not None:
            raise _lacks(checkpoint, where, name)
    return keys


def _windows(checkpoint: PrunedCheckpoint, windowed: Sequence[bool], where: str) -> list[tuple[str, Any]]:
    """Return the keys of the windows: of every so many layers, the last one has none."""
    count = len(windowed)
    period = next(
        (p for p in range(1, count + 2) if all(has == (i % p < p - 1) for i, has in enumerate(windowed))), None
    )
    if period is None:
        raise _lacks(checkpoint, where, "windows but in all layers except the last of every so many")
    values = vars(checkpoint.dense)
    # Without windows one as long as the text, because the architecture may have a window where the file names none.
    window = values["sliding_window"] if any(windowed) else values["max_position_embeddings"]
    return [("add_sliding_window", int(window)), ("add_sliding_window_pattern", period)]


def _query_scale(checkpoint: PrunedCheckpoint, known: LlamaCpp, shape: LayerShape) -> float:
    """Return the softmax scale of the model over that of llama.cpp."""
    width, hidden = shape.qk_head_dim, checkpoint.dense.hidden_size
    wanted = width**-0.5
    if checkpoint.spec.fixed_scale:
        spec = checkpoint.spec
        skeleton = build_skeleton(checkpoint.dense, checkpoint.name, torch.float32)
        wanted = float(skeleton.get_submodule(f"{spec.layers}.0.{spec.attention}").scaling)
    of_hidden = known.scale_from_hidden == checkpoint.num_layers
    given = (hidden // shape.num_attention_heads if of_hidden else width) ** -0.5
    return wanted / given


def _padding_notes(checkpoint: PrunedCheckpoint, known: LlamaCpp, shapes: tuple[LayerShape, ...]) -> list[str]:
    padded = sum(old != new for old, new in zip(checkpoint.shapes, shapes, strict=True))
    if not padded:
        return []
    avoidable = "" if known.fills_hidden else ", which pruning with --target llama.cpp avoids"
    return [
        f"{padded} of {len(shapes)} layers are zero-padded, because llama.cpp's architecture "
        f"{known.architecture!r} has one shape for all layers: the decoder weights grow by "
        f"{padding_cost(checkpoint, shapes):.1%}{avoidable}."
    ]
