"""Checkpoints that `prune` has written, read one layer at a time as family-independent tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from intraslice.checkpoint.composite import is_composite, text_config, text_tensors
from intraslice.checkpoint.config_file import CONFIG_FILE, check_layers, make_config, read_config_data
from intraslice.checkpoint.folder import StoredTensor, read_headers
from intraslice.checkpoint.ownership import check_intact
from intraslice.checkpoint.reader import check_shapes
from intraslice.checkpoint.tensorfile import DTYPES
from intraslice.errors import CheckpointError, UnsupportedModelError, one_line
from intraslice.layers.state_dict import NeutralLayer, split_layer
from intraslice.names import expanded
from intraslice.runtime import register
from intraslice.runtime.configuration_intraslice import dense_config, dense_shapes, family_of, rotary_dim, rotated
from intraslice.runtime.families_intraslice import FamilySpec, LayerShape
from intraslice.runtime.modeling_intraslice import pair_channels

_NO_EFFECT = {"weight": 1.0, "bias": 0.0}
"""What stands for a norm that is not there."""


class PrunedCheckpoint:
    """A checkpoint folder written by this package, read one layer at a time; made by `open_pruned`.

    Attributes:
        folder: where it lies.
        name: as the user gave it.
        config: IntraSlice config.
        dense: stock config of the dense model.
        spec: the family.
        shapes: of each layer.
        rotated: whether each layer rotates query and key.
        dense_shape: of each layer of the dense model; they are alike, other runtimes know only one.
        composite: whether the folder holds more than this model, which is its text tower then.
    """

    def __init__(
        self, folder: Path, name: str, config: Any, tensors: dict[str, StoredTensor], *, composite: bool = False
    ) -> None:
        self.composite = composite
        self.folder = folder
        self.name = name
        self.config = config
        self.dense = dense_config(config)
        self.spec: FamilySpec = family_of(config)
        self.shapes: tuple[LayerShape, ...] = config.layer_shapes
        self.dense_shape = dense_shapes(config, self.spec)[0]
        self.rotated = tuple(rotated(config, self.spec, index) for index in range(len(self.shapes)))
        self._tensors = tensors

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.shapes)

    @property
    def has_output_biases(self) -> bool:
        """Whether a layer has biases on o_proj and down_proj that its family may not have."""
        return any(shape.output_bias for shape in self.shapes)

    def pair_channels(self, index: int) -> Tensor | None:
        """Return the channels of each rotary pair of a dense head of layer `index`, [d / 2, 2]; None without RoPE."""
        if not self.rotated[index]:
            return None
        return pair_channels(rotary_dim(self.dense, index), self.dense_shape.qk_head_dim, self.spec.interleaved)

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
        tensors |= self._absent(self.shapes[index])
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

    def _absent(self, shape: LayerShape) -> dict[str, Tensor]:
        """Return what stands for the blocks that a layer does not have: no heads or channels, and norms without effect.

        Other formats may have to hold a block there all the same.
        """
        spec, found = self.spec, {}
        sizes = spec.linear_sizes(replace(shape, dropped=()), self.config.hidden_size)
        blocks = (
            (shape.has_attention, spec.attention_paths, (spec.attention_norm, spec.attention_out_norm)),
            (shape.has_ffn, spec.ffn_paths, (spec.ffn_norm, spec.ffn_out_norm)),
        )
        for kept, (reading, output), norms in blocks:
            if kept:
                continue
            for path in (*reading, output):
                for name, size in ((f"{path}.weight", sizes[path]), (f"{path}.bias", sizes[path][:1])):
                    if (like := self._anywhere(name)) is not None:
                        found[name] = torch.zeros(size, dtype=DTYPES[like.dtype])
            for name, fill in ((f"{norm}.{kind}", fill) for norm in norms for kind, fill in _NO_EFFECT.items()):
                if (like := self._anywhere(name)) is not None:
                    found[name] = torch.full(like.shape, fill, dtype=DTYPES[like.dtype])
        return found

    def _anywhere(self, name: str) -> StoredTensor | None:
        """Return the tensor of this name within its layer that the first layer to have one stores."""
        stored = (self._tensors.get(f"{self.layer_prefix(index)}{name}") for index in range(self.num_layers))
        return next((tensor for tensor in stored if tensor is not None), None)

    def load_rest(self) -> dict[str, Tensor]:
        """Load all tensors outside the decoder layers, by full name."""
        prefix = f"{self.spec.layers}."
        return {name: _read(stored) for name, stored in self._tensors.items() if not name.startswith(prefix)}

    def shared_pairs(self) -> tuple[int, ...] | None:
        """Return the rotary pairs that every kv head of every rotated layer keeps, if it is one choice; else None.

        All pairs of the dense head are one choice too.
        """
        everything = tuple(range(self.dense_shape.qk_head_dim // 2))
        choices: set[tuple[int, ...]] = set()
        for index, shape in enumerate(self.shapes):
            if not self.rotated[index] or not shape.has_attention:
                continue
            if shape.qk_head_dim == self.dense_shape.qk_head_dim:
                choices.add(everything)
                continue
            stored = self._tensors[f"{self.layer_prefix(index)}{self.spec.attention}.rope_index"]
            choices.update(tuple(row) for row in _read(stored).tolist())
        return choices.pop() if len(choices) == 1 else None


def open_pruned(model: str) -> PrunedCheckpoint:
    """Open a checkpoint that `prune` has written; of a composite model its text tower.

    Raises:
        CheckpointError: it is not there, not ours, or damaged.
        UnsupportedModelError: its layers are not those of its family, only smaller.
    """
    register()
    folder = expanded(model)
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{model!r} is not a checkpoint folder; give the output folder of 'intraslice prune'.")
    check_intact(folder, model)
    data = read_config_data(folder, model)
    tower = data.get("text_config")
    if not any("intraslice" in part for part in (data, tower) if isinstance(part, dict)):
        raise CheckpointError(
            f"{model!r} was not pruned by intraslice, so there is nothing to export; give the output folder of "
            "'intraslice prune'."
        )
    tensors = read_headers(folder, model)
    check_layers(data, tensors, model)
    whole = make_config(data, model)
    composite = is_composite(whole)
    config = text_config(whole)
    if vars(config).get("intraslice") is None:
        raise CheckpointError(f"config.json of {model!r} names a pruned model and says nothing of its layers")
    check_shapes(config, family_of(config), model)
    if any(shape.ranks or shape.shortcuts for shape in config.layer_shapes):
        raise UnsupportedModelError(
            f"{model!r} was pruned by {config.intraslice['method']}, whose layers no other runtime knows; it runs in "
            "transformers, and can be exported only after another method, for example intraslice."
        )
    if len(set(dense_shapes(config, family_of(config)))) > 1:
        raise UnsupportedModelError(
            f"{model!r} was pruned from a model whose layers have different sizes, for which no other format has a "
            "place here; load it with transformers as it is."
        )
    if composite:
        tensors = text_tensors(model, whole.model_type, tensors)
    return PrunedCheckpoint(folder, model, config, tensors, composite=composite)


def _read(stored: StoredTensor) -> Tensor:
    with safe_open(stored.path, framework="pt") as file:
        return file.get_tensor(stored.name)
