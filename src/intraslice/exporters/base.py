"""What all exporters share: the opened checkpoint, neutral layers, zero-padding, the report.

Padding is exact: a zero row of o_proj or down_proj silences whatever the padded channels hold, and zero rows of q and k
add nothing to the scores.

Shapes: D hidden_size, K kv heads, r qk_head_dim, p v_head_dim, d head_dim of the dense model, F intermediate_size.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor

from intraslice.checkpoint.folder import StoredTensor, one_line, read_headers
from intraslice.checkpoint.tensorfile import writing
from intraslice.checkpoint.writer import check_output, publish
from intraslice.errors import CheckpointError, RecipeError, UnsupportedModelError, nearest
from intraslice.layers.state_dict import NeutralLayer, split_layer
from intraslice.layers.weights import AttentionWeights, FFNWeights
from intraslice.runtime import register
from intraslice.runtime.configuration_intraslice import dense_config, dense_shape, rotary_dim
from intraslice.runtime.families_intraslice import FAMILIES, FamilySpec, LayerShape
from intraslice.runtime.modeling_intraslice import pair_channels


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the user may choose.

    Attributes:
        dtype: of the written weights: "auto" keeps the checkpoint's, or "float32", "bfloat16", "float16".
        pad_to: for padded: "dense" (the shapes of the dense model) or "max" (the largest of each size over the layers).
        tokenizer_from: for gguf: a GGUF file of the same base model whose tokenizer keys are copied.
        verify: reload the result in its runtime, where that is installed, and compare the logits of a prompt.
        overwrite: replace an existing output.
    """

    dtype: str = "auto"
    pad_to: str = "dense"
    tokenizer_from: str | None = None
    verify: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, known in (("dtype", ("auto", "float32", "bfloat16", "float16")), ("pad_to", ("dense", "max"))):
            value = getattr(self, name)
            if value not in known:
                raise RecipeError(f"{name} must be one of {', '.join(known)}, got {value!r}.{nearest(value, known)}")


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export has written.

    Attributes:
        to: name of the exporter.
        output: the folder or file that was written.
        notes: remarks for the user, one sentence each, for example what padding costs.
        max_logit_difference: largest difference to the logits of the checkpoint on a prompt; None when not verified.
        seconds: wall-clock time.
    """

    to: str
    output: str
    notes: tuple[str, ...] = ()
    max_logit_difference: float | None = None
    seconds: float = 0.0


class PrunedCheckpoint:
    """A checkpoint folder written by this package, read one layer at a time; made by `open_pruned`.

    Attributes:
        folder: where it lies.
        name: as the user gave it.
        config: IntraSlice config.
        dense: stock config of the dense model.
        spec: the family.
        shapes: of each layer.
        dense_shape: of each layer of the dense model.
    """

    def __init__(self, folder: Path, name: str, config: Any, tensors: dict[str, StoredTensor]) -> None:
        self.folder = folder
        self.name = name
        self.config = config
        self.dense = dense_config(config)
        self.spec: FamilySpec = FAMILIES[config.family]
        self.shapes: tuple[LayerShape, ...] = config.layer_shapes
        self.dense_shape = dense_shape(config, self.spec)
        self._tensors = tensors

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.shapes)

    @property
    def has_output_biases(self) -> bool:
        """Whether a layer has biases on o_proj and down_proj that its family may not have."""
        return any(shape.output_bias for shape in self.shapes)

    @property
    def pair_channels(self) -> Tensor | None:
        """Channels of each rotary pair of a dense head, [d / 2, 2]; None without RoPE."""
        if not self.spec.rope:
            return None
        return pair_channels(rotary_dim(self.dense), self.dense_shape.qk_head_dim)

    def layer_prefix(self, index: int) -> str:
        """Return what the names of layer `index` begin with."""
        return f"{self.spec.layers}.{index}."

    def load_layer(self, index: int) -> NeutralLayer:
        """Load one layer, as stored (no cast).

        Raises:
            CheckpointError: the weights do not have the shapes of the config.
        """
        prefix = self.layer_prefix(index)
        tensors = {
            name[len(prefix) :]: _read(stored) for name, stored in self._tensors.items() if name.startswith(prefix)
        }
        promise = f"layer {index} of {self.name!r} does not have the weights that its config.json promises"
        try:
            layer = split_layer(tensors, self.spec, self.shapes[index])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{promise} ({one_line(error)})") from error
        shape, ffn, hidden = layer.shape, layer.ffn, self.config.hidden_size
        context, channels = shape.num_attention_heads * shape.v_head_dim, shape.intermediate_size
        sizes = [(layer.attention.o, (hidden, context)), (ffn.down, (hidden, channels))]
        sizes += [(tensor, (channels, hidden)) for tensor in (ffn.up, ffn.gate) if tensor is not None]
        for tensor, size in sizes:
            if tuple(tensor.shape) != size:
                raise CheckpointError(f"{promise} (shape {list(tensor.shape)} instead of {list(size)})")
        return layer

    def load_rest(self) -> dict[str, Tensor]:
        """Load all tensors outside the decoder layers, by full name."""
        prefix = f"{self.spec.layers}."
        return {name: _read(stored) for name, stored in self._tensors.items() if not name.startswith(prefix)}

    def shared_pairs(self) -> tuple[int, ...] | None:
        """Return the rotary pairs that every kv head of every layer keeps, when it is one choice; None otherwise.

        All pairs of the dense head are one choice too.
        """
        if not self.spec.rope:
            return None
        everything = tuple(range(self.dense_shape.qk_head_dim // 2))
        choices: set[tuple[int, ...]] = set()
        for index, shape in enumerate(self.shapes):
            if shape.qk_head_dim == self.dense_shape.qk_head_dim:
                choices.add(everything)
                continue
            stored = self._tensors[f"{self.layer_prefix(index)}{self.spec.attention}.rope_index"]
            choices.update(tuple(row) for row in _read(stored).tolist())
        return choices.pop() if len(choices) == 1 else None


def open_pruned(model: str) -> PrunedCheckpoint:
    """Open a checkpoint that `prune` has written.

    Raises:
        CheckpointError: it is not there, not ours, or damaged.
        UnsupportedModelError: its layers are not those of its family, only smaller.
    """
    from transformers import AutoConfig

    register()
    folder = Path(model).expanduser()
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{model!r} is not a checkpoint folder; give the output folder of 'intraslice prune'.")
    try:
        ours = "intraslice" in json.loads(path.read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder) if ours else None
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json of {model!r} is not valid: {one_line(error)}") from error
    if config is None:
        raise CheckpointError(
            f"{model!r} was not pruned by intraslice, so there is nothing to export; give the output folder of "
            "'intraslice prune'."
        )
    if any(shape.ranks or shape.shortcuts for shape in config.layer_shapes):
        raise UnsupportedModelError(
            f"{model!r} was pruned by {config.intraslice['method']}, whose layers no other runtime knows; it runs in "
            "transformers, and can be exported only after another method, for example intraslice."
        )
    return PrunedCheckpoint(folder, model, config, read_headers(folder, model))


def _read(stored: StoredTensor) -> Tensor:
    with safe_open(stored.path, framework="pt") as file:
        return file.get_tensor(stored.name)


def pad_layer(
    layer: NeutralLayer, shape: LayerShape, pair_channels: Tensor | None, pairs: Sequence[int] | None = None
) -> NeutralLayer:
    """Scatter a layer into a larger shape with zeros; the layer computes the same with the softmax scale it had.

    Args:
        layer: the layer.
        shape: the larger shape: one group size, qk_head_dim == v_head_dim.
        pair_channels: channels of each pair of a dense head, [d / 2, 2]; None without RoPE.
        pairs: dense pairs that the rows of a head of `shape` stand for, ascending; None: all of the dense head. With
            a subset a head's rows are the first channels of these pairs, then the second channels.

    Returns:
        The layer in `shape`; its `rope_pairs` are None.

    Raises:
        UnsupportedModelError: the layer does not fit into `shape`.
    """
    source, attention = layer.shape, layer.attention
    group, width = shape.heads_per_kv[0], shape.qk_head_dim
    fits = source.num_key_value_heads <= shape.num_key_value_heads and max(source.heads_per_kv) <= group
    if not fits or source.v_head_dim > width or source.intermediate_size > shape.intermediate_size:
        raise UnsupportedModelError(f"a layer of shape {source.to_dict()} does not fit into {shape.to_dict()}.")
    channels_Kr = _head_channels(layer, pair_channels, pairs, width)
    v_channels = torch.arange(source.v_head_dim)
    kv_of_head = torch.repeat_interleave(torch.tensor(source.heads_per_kv))
    q_channels = channels_Kr[kv_of_head]
    q_places = torch.cat([kv * group + torch.arange(count) for kv, count in enumerate(source.heads_per_kv)])
    kv_places = torch.arange(source.num_key_value_heads)
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads

    def rows(tensor: Tensor | None, count: int, places: Tensor, channels: Tensor) -> Tensor | None:
        if tensor is None:
            return None
        padded = tensor.new_zeros(count, width, *tensor.shape[2:])
        padded[places[:, None], channels] = tensor
        return padded

    o = attention.o.new_zeros(attention.o.shape[0], heads * width)
    o[:, (q_places[:, None] * width + v_channels).flatten()] = attention.o
    v_rows = v_channels.expand(source.num_key_value_heads, -1)
    padded = AttentionWeights(
        q=_some(rows(attention.q, heads, q_places, q_channels)),
        k=_some(rows(attention.k, kv_heads, kv_places, channels_Kr)),
        v=_some(rows(attention.v, kv_heads, kv_places, v_rows)),
        o=o,
        q_bias=rows(attention.q_bias, heads, q_places, q_channels),
        k_bias=rows(attention.k_bias, kv_heads, kv_places, channels_Kr),
        v_bias=rows(attention.v_bias, kv_heads, kv_places, v_rows),
        o_bias=attention.o_bias,
    )
    missing = shape.intermediate_size - source.intermediate_size

    def more_rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])

    ffn = layer.ffn
    return NeutralLayer(
        attention=padded,
        ffn=FFNWeights(
            up=_some(more_rows(ffn.up)),
            gate=more_rows(ffn.gate),
            # Zero columns silence the padded channels whatever the activation makes of zero.
            down=torch.cat([ffn.down, ffn.down.new_zeros(ffn.down.shape[0], missing)], dim=1),
            up_bias=more_rows(ffn.up_bias),
            gate_bias=more_rows(ffn.gate_bias),
            down_bias=ffn.down_bias,
        ),
        rest=layer.rest,
        rope_pairs=None,
        shape=shape,
    )


def _some(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _head_channels(
    layer: NeutralLayer, pair_channels: Tensor | None, pairs: Sequence[int] | None, width: int
) -> Tensor:
    """Return where each row of a query or key head goes in a head of the larger shape, [K, r]."""
    kv_heads, narrow = layer.shape.num_key_value_heads, layer.shape.qk_head_dim
    if pair_channels is None:
        return torch.arange(narrow).expand(kv_heads, -1)
    num_pairs = pair_channels.shape[0]
    if layer.rope_pairs is not None:
        own = layer.rope_pairs
    elif narrow == 2 * num_pairs and pairs is None:
        # All pairs, in the order of the dense head.
        return torch.arange(narrow).expand(kv_heads, -1)
    else:
        own = torch.arange(num_pairs).expand(kv_heads, -1)
    if pairs is None:
        return torch.cat([pair_channels[own, 0], pair_channels[own, 1]], dim=1)
    place = torch.full((num_pairs,), -1)
    place[list(pairs)] = torch.arange(len(pairs))
    places = place[own]
    if (places < 0).any() or 2 * len(pairs) != width:
        raise UnsupportedModelError("the kept rotary pairs of a head are not among those of the larger shape.")
    return torch.cat([places, len(pairs) + places], dim=1)


def with_output_biases(layer: NeutralLayer) -> NeutralLayer:
    """Return the layer with zero biases where o_proj or down_proj has none."""
    o, down = layer.attention.o, layer.ffn.down

    def filled(bias: Tensor | None, weight: Tensor) -> Tensor:
        return weight.new_zeros(weight.shape[0]) if bias is None else bias

    return replace(
        layer,
        attention=replace(layer.attention, o_bias=filled(layer.attention.o_bias, o)),
        ffn=replace(layer.ffn, down_bias=filled(layer.ffn.down_bias, down)),
    )


def with_all_biases(layer: NeutralLayer) -> NeutralLayer:
    """Return the layer with zero biases where a projection has none, for classes that have all or none."""
    layer = with_output_biases(layer)

    def filled(weights: Any, names: Sequence[str]) -> Any:
        found = {name: getattr(weights, name) for name in names if getattr(weights, name) is not None}
        missing = [name for name in found if getattr(weights, f"{name}_bias") is None]
        return replace(weights, **{f"{name}_bias": found[name].new_zeros(found[name].shape[:-1]) for name in missing})

    return replace(layer, attention=filled(layer.attention, "qkv"), ffn=filled(layer.ffn, ("up", "gate")))


def scale_queries(layer: NeutralLayer, factor: float) -> NeutralLayer:
    """Multiply the queries, for runtimes whose softmax scale is another one than that of the dense head."""
    attention = layer.attention
    # In float32: what is rounded afterwards is the product.
    bias = None if attention.q_bias is None else attention.q_bias.float() * factor
    return replace(layer, attention=replace(attention, q=attention.q.float() * factor, q_bias=bias))


def padding_cost(checkpoint: PrunedCheckpoint, shapes: Sequence[LayerShape]) -> float:
    """Return by which fraction the decoder layers' linear weights grow when each layer gets its shape in `shapes`."""

    def total(found: Sequence[LayerShape]) -> int:
        return sum(checkpoint.spec.num_parameters(shape, checkpoint.config.hidden_size) for shape in found)

    return total(shapes) / total(checkpoint.shapes) - 1.0


PROMPT_TOKENS = 24


def prompt_tokens(vocab_size: int) -> Tensor:
    """Return the token ids that exports are verified with, [1, T]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (1, PROMPT_TOKENS), generator=generator)


@torch.no_grad()
def reference_logits(checkpoint: PrunedCheckpoint, tokens_1T: Tensor) -> Tensor:
    """Return the logits of the checkpoint itself in float32, [1, T, vocabulary]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    return model(tokens_1T).logits


@contextmanager
def staged_folder(output: Path, overwrite: bool, *, source: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `output` at the end; after an error nothing is left of it.

    Args:
        output: final name.
        overwrite: replace an existing output.
        source: folder of the checkpoint; it is never replaced.

    Raises:
        OutputError: `output` may not be replaced, or cannot be written.
    """
    check_output(output, overwrite, source=source)
    parent = output.absolute().parent
    with writing(output):
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.absolute().name}.partial-", dir=parent))
        # A folder inside, because mkdtemp makes one that nobody else may read.
        staging = scratch / output.absolute().name
        staging.mkdir()
    try:
        yield staging
        publish(staging, output, overwrite)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# Rotary types whose frequencies are constants; those of the others change with the length of the text.
_CONSTANT_ROPE = ("default", "linear", "llama3", "yarn")


def rope_type(checkpoint: PrunedCheckpoint) -> str:
    """Return the type of the dense model's rotary embedding."""
    return (vars(checkpoint.dense).get("rope_parameters") or {}).get("rope_type", "default")


def dense_frequencies(checkpoint: PrunedCheckpoint) -> tuple[Tensor, float] | None:
    """Return the inverse frequencies of the rotated pairs of a dense head, float64, and the factor on cos and sin.

    None when they change with the length of the text.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dense, kind = checkpoint.dense, rope_type(checkpoint)
    if kind not in _CONSTANT_ROPE:
        return None
    if kind == "default":
        rotated = rotary_dim(dense)
        base = float(vars(dense)["rope_parameters"]["rope_theta"])
        return base ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated), 1.0
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](dense, torch.device("cpu"))
    return frequencies.double(), float(attention_factor)


_TOLERANCE = {"float16": 0.02, "bfloat16": 0.1}


def check_logits(found: Tensor, wanted: Tensor, dtype: str) -> float:
    """Return the largest difference of the logits of an export to those of the checkpoint.

    Args:
        found: logits of the export.
        wanted: logits of the checkpoint.
        dtype: of the exported weights; half precision may differ more.

    Raises:
        CheckpointError: the difference is more than rounding.
    """
    difference = float((found.float() - wanted).abs().max())
    limit = _TOLERANCE.get(dtype, 0.0) * float(wanted.abs().max()) + 1e-2
    if not difference <= limit:
        raise CheckpointError(
            f"the export computes other logits than the checkpoint (difference {difference:.3g}, at most {limit:.3g} "
            "is rounding); nothing was written. Please report this."
        )
    return difference
