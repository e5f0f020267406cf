"""config.json as it comes from outside: read, checked against limits, and made a config by transformers.

A config decides what is built: modules for each layer, tables for each position. So it is compared with these limits
and with the names of the stored tensors before anything is built from it. What chooses kernels of attention is not
read at all: some of its values are fetched from the hub, and they are code.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from intraslice.border import foreign, read_json
from intraslice.errors import CheckpointError

CONFIG_FILE = "config.json"
MAX_LAYERS = 4096
"""Modules of one kind in a model whose tensors are not at hand; the deepest ones have a few hundred."""
MAX_SIZE = (1 << 31) - 1
"""Of a width, a vocabulary, a number of positions."""

_LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_decoder_layers", "num_encoder_layers"),
    *("encoder_layers", "decoder_layers", "depth", "num_nextn_predict_layers"),
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_shared_experts")
_LABELS = ("num_labels",)
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "ffn_dim", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings", "word_embed_proj_dim", "image_size", "patch_size", "num_channels"),
)
_LIMITS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(_LAYERS, (0, MAX_LAYERS)),
    **dict.fromkeys(_EXPERTS, (0, MAX_LAYERS)),
    **dict.fromkeys(_LABELS, (0, MAX_LAYERS)),
    **dict.fromkeys(_SIZES, (0, MAX_SIZE)),
    "num_hidden_layers": (1, MAX_LAYERS),
    "hidden_size": (1, MAX_SIZE),
    "vocab_size": (1, MAX_SIZE),
}
_DTYPES = ("float32", "float16", "bfloat16", "float64", "float", "half", "double", "auto")
# The first ones choose code; what is asked for at each call is no property of a model.
_NOT_READ = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"),
    *("_experts_implementation", "_experts_implementation_internal", "use_kernels", "kernel_config", "_auto_class"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "name_or_path", "_name_or_path"),
    *(
        "_commit_hash",
        "attribute_map",
        "sub_configs",
        "sub_configs_defaults",
        "base_model_tp_plan",
        "base_model_pp_plan",
    ),
    *("base_model_ep_plan", "base_model_fsdp_plan", "extra_files", "extra_config_files", "is_heterogeneous"),
)


def read_config_data(folder: Path, name: str) -> dict[str, Any]:
    """Read config.json of a model folder; nothing is built from it.

    Args:
        folder: of a dense or pruned model.
        name: how messages call the model.

    Returns:
        Its content, without what chooses kernels and without names of methods of the config class.

    Raises:
        CheckpointError: there is none, it is no plain data, or a number in it is one that no model can have.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{name!r} has no config.json; give the folder of a Hugging Face model")
    data = _without_methods(read_json(path, f"config.json of {name!r}", CheckpointError))
    if data.get("model_type") == "mistral" and "layer_types" in data:
        # As AutoConfig does: layers of two kinds are what this class is for.
        data["model_type"] = "ministral"
    for place, section in _sections(data):
        for field, (low, high) in _LIMITS.items():
            value = section.get(field)
            if isinstance(value, int) and not low <= value <= high:
                raise CheckpointError(
                    f"config.json of {name!r} has {place}{field} = {value}, and a model has {low} to {high}"
                )
        for field in ("dtype", "torch_dtype"):
            dtype = section.get(field)
            if dtype is not None and not (isinstance(dtype, str) and dtype.removeprefix("torch.") in _DTYPES):
                raise CheckpointError(
                    f"config.json of {name!r} has {place}{field} = {str(dtype)[:80]!r}, which is no dtype of weights; "
                    "it is float32, bfloat16 or float16"
                )
    return data


def check_layers(data: dict[str, Any], names: Iterable[str], name: str) -> None:
    """Refuse a config with more layers than the names of the tensors count; nothing is built from it before.

    Args:
        data: content of config.json.
        names: of all stored tensors, such as "model.layers.3.mlp.up_proj.weight".
        name: how messages call the model.

    Raises:
        CheckpointError: there are more.
    """
    numbers = (int(part) for stored in names for part in stored.split(".") if part.isdecimal() and len(part) < 10)
    layers = 1 + max(numbers, default=0)
    for place, section in _sections(data):
        # A pruned model lists its layers, and the last ones may have lost all their tensors.
        if "intraslice" in section:
            continue
        for field in _LAYERS:
            value = section.get(field)
            if isinstance(value, int) and value > layers:
                raise CheckpointError(
                    f"config.json of {name!r} has {place}{field} = {value}, but its tensors are those of {layers} "
                    "layers at most; check that config and weights belong together"
                )


def make_config(data: dict[str, Any], name: str) -> Any:
    """Return a checked content of config.json as the config class that transformers has for it; runs no code of it.

    Raises:
        CheckpointError: transformers does not know the architecture, or refuses the config.
    """
    from transformers import CONFIG_MAPPING

    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"config.json of {name!r} has model_type = {str(model_type)[:80]!r}, which the installed transformers does "
            "not know; a model that needs code of its own cannot be used here without trust_remote_code"
        )
    with foreign(f"config.json of {name!r} is not valid", CheckpointError):
        return CONFIG_MAPPING[model_type].from_dict(data)


def _sections(data: dict[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects in a config, it first, with what stands in front of the names of their fields."""
    yield place, data
    for name, value in data.items():
        if isinstance(value, dict) and name != "intraslice":
            yield from _sections(value, f"{place}{name}.")


def _without_methods(data: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_methods(value) if isinstance(value, dict) and name != "intraslice" else value
        for name, value in data.items()
        if name not in _NOT_READ and not _is_method(name)
    }


@cache
def _is_method(name: str) -> bool:
    """Return whether a field of this name would take the place of a method of the config class."""
    from transformers import PretrainedConfig

    found = inspect.getattr_static(PretrainedConfig, name, None)
    return name.startswith("__") or callable(found) or isinstance(found, classmethod | staticmethod)
