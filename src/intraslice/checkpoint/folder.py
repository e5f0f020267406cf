"""What is in a model folder, found without reading weights: valid config, whole and safe files, headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from intraslice.border import foreign, parse_json, read_json
from intraslice.checkpoint.config_file import check_layers, make_config, read_config_data
from intraslice.checkpoint.missing import missing_features
from intraslice.checkpoint.tensorfile import StoredTensor
from intraslice.checkpoint.writer import INDEX_FILE, WEIGHTS_FILE
from intraslice.digests import range_digest
from intraslice.errors import CheckpointError, UnsupportedModelError
from intraslice.runtime.families_intraslice import FAMILIES

_ADAPTER_FILE = "adapter_config.json"


def read_config(folder: Path, name: str, tensors: Iterable[str]) -> Any:
    """Read config.json as the stock config class of a supported family or composite; never runs code of the model.

    Args:
        folder: of the model.
        name: how messages call it.
        tensors: names of what is stored; the config is not built if it contradicts them.

    Raises:
        UnsupportedModelError: the architecture is not supported, is quantised, or is pruned already.
        CheckpointError: the file is missing or not a valid config.
    """
    data = check_architecture(folder, name)
    check_layers(data, tensors, name)
    return make_config(data, name)


def check_architecture(folder: Path, name: str) -> dict[str, Any]:
    """Refuse a model that cannot be pruned, by its config.json alone.

    Returns:
        The content of that file.

    Raises:
        UnsupportedModelError: the architecture is not supported, is quantised, or is pruned already.
        CheckpointError: the file is missing or no plain data.
    """
    data = read_config_data(folder, name)
    if is_pruned_config(data):
        raise UnsupportedModelError(
            f"{name!r} is already pruned by intraslice; prune the dense model to the sparsity you want"
        )
    text = check_family(data, name)
    settings = data.get("quantization_config") or text.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise UnsupportedModelError(f"{name!r} is quantised ({method}); give the model in float32, bfloat16 or float16")
    return data


def is_pruned_config(data: dict[str, Any]) -> bool:
    """Return whether config.json is that of a model that intraslice has pruned."""
    return "intraslice" in data or str(data.get("model_type", "")).startswith("intraslice_")


def check_family(data: dict[str, Any], name: str) -> dict[str, Any]:
    """Check that a dense model is of a family that can be pruned, and say what is missing where it is not.

    Args:
        data: config.json.
        name: how messages call the model.

    Returns:
        The part of the config that is about the decoder layers: all of it, or that of the text tower of a composite.

    Raises:
        UnsupportedModelError: the architecture is not supported, needs a newer transformers, or is switched to a
            computation that is not known.
    """
    from transformers import CONFIG_MAPPING
    from transformers import __version__ as transformers_version

    model_type = str(data.get("model_type", ""))
    composite = "text_config" in data or model_type in composites()
    text = _checked_text(data, model_type, name) if composite else data
    family = str(text.get("model_type", "")) if composite else model_type
    if not composite and family not in FAMILIES:
        code = " and it needs code of its own" if "auto_map" in data else ""
        missing = missing_features(data)
        what = f"; what is missing for it: {', '.join(missing)}" if missing else ""
        raise UnsupportedModelError(
            f"{name!r} has the architecture {model_type or 'unknown'!r}{code}{what}; supported: {', '.join(FAMILIES)}"
        )
    spec = FAMILIES[family]
    for needed in dict.fromkeys((model_type, family)):
        if needed not in CONFIG_MAPPING:
            raise UnsupportedModelError(
                f"{name!r} is a {needed} model, which needs transformers {spec.since} or later, and "
                f"{transformers_version} is installed; upgrade it"
            )
    for field in spec.refuse:
        if text.get(field):
            raise UnsupportedModelError(
                f"{name!r} has {field} = {text[field]!r} in its config.json, and {family} models with {field} "
                "cannot be pruned; give one without it"
            )
    return text


def composites() -> dict[str, tuple[str, ...]]:
    """Return the composite model types of the table, each with the families that its text tower may be of."""
    found: dict[str, tuple[str, ...]] = {}
    for spec in FAMILIES.values():
        for composite in spec.text_of:
            found[composite] = (*found.get(composite, ()), spec.name)
    return found


def _checked_text(data: dict[str, Any], model_type: str, name: str) -> dict[str, Any]:
    """Return the text tower's part of the config of a composite, its family filled in where it may be of one only.

    Raises:
        UnsupportedModelError: there is none, or it is of a family that cannot be pruned.
    """
    text = data.get("text_config")
    reason = composite_reason(model_type, text.get("model_type") if isinstance(text, dict) else None)
    if reason is not None:
        missing = missing_features(text) if isinstance(text, dict) else []
        what = f"; what is missing for its text tower: {', '.join(missing)}" if missing else ""
        raise UnsupportedModelError(f"{name!r} {reason}{what}")
    if not isinstance(text, dict):
        raise UnsupportedModelError(
            f"{name!r} is a composite checkpoint ({model_type}) whose config.json has no text_config, so that there is "
            "no text tower to prune; give the config.json that belongs to the model"
        )
    return {"model_type": composites()[model_type][0], **text}


def composite_reason(model_type: str, text_type: str | None) -> str | None:
    """Return why a composite checkpoint is refused, to stand after its name; None when its text tower can be pruned.

    Args:
        model_type: that of the checkpoint.
        text_type: that of its text tower, where its config says so.
    """
    if model_type not in composites():
        tower = f", whose text tower is a {text_type} model" if text_type else ""
        return (
            f"is a composite checkpoint of the architecture {model_type or 'unknown'!r}{tower}; composites whose text "
            f"tower can be pruned: {', '.join(composites())}"
        )
    families = composites()[model_type]
    if text_type not in (None, *families):
        return (
            f"is a composite checkpoint ({model_type}) whose text tower, a {text_type} model, cannot be pruned; "
            f"supported text towers of {model_type}: {', '.join(families)}"
        )
    return None


def weight_files(folder: Path, name: str) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises:
        CheckpointError: there are none, only pickles, or the index names a file that is missing; or there is an
            adapter beside them, with which they are another model.
    """
    if (folder / _ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{name!r} holds an adapter ({_ADAPTER_FILE}) beside its weights, which some programs would apply and "
            "others not; merge it into the weights, or move that file away"
        )
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{name!r} holds its weights only as a pickle ({pickles[0]}), which can run code when "
                "it is read; convert it to safetensors first"
            )
        raise CheckpointError(f"{name!r} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there")
    weight_map = read_json(index, f"{INDEX_FILE} of {name!r}", CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise CheckpointError(f"{INDEX_FILE} of {name!r} is corrupt; download the model again")
    names = sorted(set(weight_map.values()))
    for file_name in names:
        # A name with a folder in it could point outside the checkpoint.
        if Path(file_name).name != file_name or not (folder / file_name).is_file():
            raise CheckpointError(f"weight file {file_name!r} of {name!r} is missing; download the model again")
    return [folder / file_name for file_name in names]


def read_headers(folder: Path, name: str) -> dict[str, StoredTensor]:
    """Return where each tensor of a model folder lies; reads no weights.

    Raises:
        CheckpointError: there are no weights, or a file is truncated or corrupt.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder, name):
        what = f"weight file {path.name!r} of {name!r} is truncated or corrupt"
        with foreign(what, CheckpointError, "; download the model again"), safe_open(path, framework="pt") as file:
            for key in file.keys():
                part = file.get_slice(key)
                tensors[key] = StoredTensor(path, key, part.get_dtype(), tuple(part.get_shape()))
    return tensors


def data_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Return first and last byte (exclusive) of each tensor of a safetensors file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length).decode(), f"the header of {str(path)!r}", CheckpointError)
    start = 8 + length
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def with_digests(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors with the digests of their bytes; reads all weights, a few megabytes in memory at a time.

    Raises:
        OSError: a file cannot be read.
        ValueError, KeyError: it is not the file any more whose header was read.
    """
    found: dict[str, StoredTensor] = {}
    by_file: dict[Path, list[str]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.path, []).append(name)
    for path, names in by_file.items():
        offsets = data_offsets(path)
        with open(path, "rb") as file:
            for name in sorted(names, key=lambda name: offsets[tensors[name].name]):
                digest = range_digest(file, *offsets[tensors[name].name])
                found[name] = replace(tensors[name], digest=digest)
    return {name: found[name] for name in tensors}
