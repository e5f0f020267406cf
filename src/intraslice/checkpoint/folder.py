"""What is in a model folder, found without reading weights: valid config, whole and safe files, headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open

from intraslice.checkpoint.missing import missing_features
from intraslice.checkpoint.tensorfile import StoredTensor
from intraslice.checkpoint.writer import INDEX_FILE, WEIGHTS_FILE
from intraslice.errors import CheckpointError, UnsupportedModelError, one_line
from intraslice.runtime.families_intraslice import FAMILIES


def read_config(folder: Path, name: str) -> Any:
    """Read config.json as the stock config class of a supported family or composite; never runs code of the model.

    Raises:
        UnsupportedModelError: the architecture is not supported, is quantised, or is pruned already.
        CheckpointError: the file is missing or not a valid config.
    """
    from transformers import CONFIG_MAPPING

    data = read_config_file(folder, name)
    model_type = str(data.get("model_type", ""))
    if is_pruned_config(data):
        raise UnsupportedModelError(
            f"{name!r} is already pruned by intraslice; prune the dense model to the sparsity you want"
        )
    text = check_family(data, name)
    settings = data.get("quantization_config") or text.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise UnsupportedModelError(f"{name!r} is quantised ({method}); give the model in float32, bfloat16 or float16")
    try:
        return CONFIG_MAPPING[model_type].from_dict(data)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json of {name!r} is not valid: {config_reason(error)}") from error


def read_config_file(folder: Path, name: str) -> dict[str, Any]:
    """Return what config.json of a model folder holds.

    Raises:
        CheckpointError: the file is missing or no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{name!r} has no config.json; give the folder of a Hugging Face model")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"config.json of {name!r} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"config.json of {name!r} is not a JSON object")
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


def config_reason(error: Exception) -> str:
    """Return in one line why a config is refused."""
    # The check of a whole config is wrapped in an error that begins with the name of a function.
    wrapped = isinstance(error, StrictDataclassClassValidationError) and error.__cause__ is not None
    return one_line(error.__cause__ if wrapped else error)


def weight_files(folder: Path, name: str) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises:
        CheckpointError: there are none, only pickles, or the index names a file that is missing.
    """
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
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{INDEX_FILE} of {name!r} is corrupt; download the model again") from error
    for file_name in names:
        # A name with a folder in it could point outside the checkpoint.
        if not isinstance(file_name, str):
            raise CheckpointError(f"{INDEX_FILE} of {name!r} is corrupt; download the model again")
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
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    tensors[key] = StoredTensor(path, key, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"weight file {path.name!r} of {name!r} is truncated or corrupt ({one_line(error)}); "
                "download the model again"
            ) from error
    return tensors


def data_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Return first and last byte (exclusive) of each tensor of a safetensors file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    start = 8 + length
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }
