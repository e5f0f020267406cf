"""What a GGUF file of a pruned model holds: shapes that llama.cpp runs, rotary factors, remarks for the user.

Here for the architecture `deci`, which has a shape per layer; `gguf_one_shape` is for those with one shape for all.

Shapes: W head width of the file, d head_dim of the dense model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intraslice.checkpoint.pruned import PrunedCheckpoint
from intraslice.errors import UnsupportedModelError
from intraslice.exporters.options import ExportOptions
from intraslice.exporters.padding import padding_cost
from intraslice.exporters.rope import dense_frequencies, rope_type
from intraslice.runtime.configuration_intraslice import rotary_dim
from intraslice.runtime.families_intraslice import LayerShape

SHAPE_PER_LAYER = "deci"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# An angle divided by this is zero: pairs that are not rotated.
_NO_ROTATION = 1e30
# llama.cpp computes nonsense for a layer with attention and no FFN channels.
_SMALLEST_FFN = 32
# Rows that are no multiple of this stay unquantised.
_QUANT_BLOCK = 32


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """What the file will hold.

    Attributes:
        architecture: of llama.cpp.
        shapes: of each layer in the file.
        pairs: dense rotary pairs of a head, when it is narrower than the dense one; None: all, in their dense places.
        row_order: where row i of a query or key head of the file comes from, int64 [W].
        rope_factors: what llama.cpp divides its angles by, float32 [W / 2]; None: they are right as they are.
        rope_base: base of the angles.
        query_scale: factor on the queries that makes up for llama.cpp's softmax scale.
        context_length: up to which the model is exact.
        dtype: of the matrices.
        notes: for the user.
        keys: more of what llama.cpp reads before the tensors: (method of gguf's GGUFWriter, its argument).
        own_head: whether the output matrix stands in the file although it is the embedding.
    """

    architecture: str
    shapes: tuple[LayerShape, ...]
    pairs: tuple[int, ...] | None
    row_order: Tensor
    rope_factors: Tensor | None
    rope_base: float
    query_scale: float
    context_length: int
    dtype: torch.dtype
    notes: tuple[str, ...]
    keys: tuple[tuple[str, Any], ...] = ()
    own_head: bool = False

    @property
    def width(self) -> int:
        """Head width W."""
        return self.row_order.numel()


def plan_shapes(checkpoint: PrunedCheckpoint, options: ExportOptions) -> FilePlan:
    """Decide what a file with a shape per layer will hold.

    Raises:
        UnsupportedModelError: llama.cpp has no place for what the model does.
    """
    spec, values = checkpoint.spec, vars(checkpoint.dense)
    channels = checkpoint.pair_channels(0)
    if spec.llama_cpp_lacks or channels is None:
        raise UnsupportedModelError(
            f"a {spec.name} model cannot be exported to GGUF: llama.cpp's architecture with a shape per layer has no "
            f"{', no '.join(spec.llama_cpp_lacks)}; load the checkpoint with transformers or vLLM instead"
        )
    check_activation(checkpoint, ("silu", "swish"), "llama.cpp's architecture with a shape per layer")
    dense_width, shared = checkpoint.dense_shape.qk_head_dim, checkpoint.shared_pairs()
    widest_value = max(shape.v_head_dim for shape in checkpoint.shapes)
    narrow = shared is not None and widest_value <= 2 * len(shared) < dense_width
    pairs = shared if narrow else None
    width = 2 * len(pairs) if pairs is not None else dense_width
    last = checkpoint.num_layers - 1
    shapes = tuple(
        _fitting(shape, width, first=index == 0, last=index == last) for index, shape in enumerate(checkpoint.shapes)
    )
    factors, attention_factor = _rope_factors(checkpoint, pairs, width)
    context, notes = context_length(checkpoint)
    notes += _padding_notes(checkpoint, shapes) + quantisation_notes(shapes, width)
    return FilePlan(
        architecture=SHAPE_PER_LAYER,
        shapes=shapes,
        pairs=pairs,
        # A narrow head has all first channels, then all second ones.
        row_order=(channels if pairs is None else torch.arange(width).view(2, -1).T).flatten(),
        rope_factors=factors,
        rope_base=float(values["rope_parameters"]["rope_theta"]),
        query_scale=math.sqrt(width / dense_width) * attention_factor**2,
        context_length=context,
        dtype=matrix_dtype(checkpoint, options),
        notes=tuple(notes),
    )


def _fitting(shape: LayerShape, width: int, *, first: bool, last: bool) -> LayerShape:
    """Return the smallest shape of the format that holds a layer.

    llama.cpp knows layers without attention and without FFN. But it takes the head width from the first layer only if
    that one has heads; it forgets the attention of a layer that has no FFN; and from a last layer without FFN it takes
    all tokens, also those whose logits nobody asked for. There, one silent head or a few silent channels stand.
    """
    attention = shape.has_attention or first
    ffn = shape.has_ffn or attention or last
    fitting = LayerShape(
        heads_per_kv=(max(shape.heads_per_kv, default=1),) * (shape.num_key_value_heads or 1),
        qk_head_dim=width,
        v_head_dim=width,
        intermediate_size=shape.intermediate_size or _SMALLEST_FFN,
        output_bias=shape.output_bias,
    )
    gone = [name for name in shape.dropped if not {"attention": attention, "ffn": ffn}[name]]
    for name in gone:
        fitting = fitting.without(name)
    return fitting


def _rope_factors(
    checkpoint: PrunedCheckpoint, pairs: tuple[int, ...] | None, width: int
) -> tuple[Tensor | None, float]:
    """Return the divisors of llama.cpp's angles, and what the dense model multiplies cos and sin with."""
    kind, found = rope_type(checkpoint), dense_frequencies(checkpoint)
    if found is None:
        raise UnsupportedModelError(
            f"the rotary embedding of type {kind!r} changes with the length of the text, which a GGUF file of a pruned "
            "model cannot hold; load the checkpoint with transformers or vLLM instead"
        )
    frequencies, attention_factor = found
    rotated, dense_width = rotary_dim(checkpoint.dense), checkpoint.dense_shape.qk_head_dim
    base = float(vars(checkpoint.dense)["rope_parameters"]["rope_theta"])
    if attention_factor != 1.0 and rotated != dense_width:
        raise UnsupportedModelError(
            f"the rotary embedding of type {kind!r} scales {rotated} of {dense_width} channels of a head, which a GGUF "
            "file of a pruned model cannot hold; load the checkpoint with transformers or vLLM instead"
        )
    wanted = torch.zeros(dense_width // 2, dtype=torch.float64)
    wanted[: rotated // 2] = frequencies
    wanted = wanted if pairs is None else wanted[list(pairs)]
    given = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    factors = torch.where(wanted > 0, given / wanted, _NO_ROTATION).float()
    plain = torch.allclose(factors, torch.ones_like(factors), rtol=0.0, atol=1e-6)
    return None if plain else factors, attention_factor


def check_activation(checkpoint: PrunedCheckpoint, known: tuple[str, ...], where: str) -> None:
    """Refuse activation functions that the architecture does not have.

    Args:
        checkpoint: the pruned checkpoint.
        known: names of those that it has, as configs call them.
        where: the architecture in words.

    Raises:
        UnsupportedModelError: the model has another one.
    """
    found = vars(checkpoint.dense)[checkpoint.spec.activation]
    if found not in known:
        raise UnsupportedModelError(
            f"the activation {found!r} cannot be exported to GGUF: {where} has {known[0]!r} only"
        )


def windowed_layers(checkpoint: PrunedCheckpoint) -> tuple[bool, ...]:
    """Return whether each layer of the dense model attends to a window of its text only."""
    values = vars(checkpoint.dense)
    kinds = values.get("layer_types") or ["sliding_attention"] * checkpoint.num_layers
    return tuple(bool(values.get("sliding_window")) and kind == "sliding_attention" for kind in kinds)


def context_length(checkpoint: PrunedCheckpoint) -> tuple[int, list[str]]:
    """Return up to which length an architecture without windows is exact, and what is to be said of it."""
    values = vars(checkpoint.dense)
    longest, window = int(values["max_position_embeddings"]), values.get("sliding_window")
    if not window or window >= longest or not any(windowed_layers(checkpoint)):
        return longest, []
    return int(window), [
        f"llama.cpp has no attention window for this architecture, so the context length is {window} instead of "
        f"{longest} tokens: up to there a window of {window} changes nothing."
    ]


def _padding_notes(checkpoint: PrunedCheckpoint, shapes: tuple[LayerShape, ...]) -> list[str]:
    padded = [old for old, new in zip(checkpoint.shapes, shapes, strict=True) if old != new]
    if not padded:
        return []
    width = shapes[0].qk_head_dim
    reasons = []
    if any(shape.has_attention and {shape.qk_head_dim, shape.v_head_dim} != {width} for shape in padded):
        reasons.append("head widths or rotary pairs that differ")
    if any(len(set(shape.heads_per_kv)) > 1 for shape in padded):
        reasons.append("kv heads with different numbers of query heads")
    avoidable = ", which pruning with --target llama.cpp avoids" if reasons else ""
    if padded[0] is checkpoint.shapes[0] and not padded[0].has_attention:
        reasons.append("a first layer without attention")
    if any(shape.intermediate_size == 0 for shape in padded):
        reasons.append("layers without an FFN")
    return [
        f"{len(padded)} of {len(shapes)} layers are zero-padded, because llama.cpp has no place for "
        f"{' and '.join(reasons)}: the decoder weights grow by {padding_cost(checkpoint, shapes):.1%}{avoidable}."
    ]


def quantisation_notes(shapes: tuple[LayerShape, ...], width: int) -> list[str]:
    """Return what is to be said of rows that llama.cpp cannot quantise."""
    odd = sum(
        (shape.num_attention_heads * width) % _QUANT_BLOCK > 0 or shape.intermediate_size % _QUANT_BLOCK > 0
        for shape in shapes
    )
    if not odd:
        return []
    return [
        f"{odd} of {len(shapes)} layers have rows that are no multiple of {_QUANT_BLOCK}; llama.cpp's quantisation "
        "leaves those matrices in float16, and pruning with --target llama.cpp avoids them."
    ]


def matrix_dtype(checkpoint: PrunedCheckpoint, options: ExportOptions) -> torch.dtype:
    """Return the dtype of the matrices in the file."""
    if options.dtype != "auto":
        return DTYPES[options.dtype]
    stored = checkpoint.load_layer(0).attention.o.dtype
    return stored if stored in DTYPES.values() else torch.float32
