"""Load a saved model, dense or pruned, to use it or to look at its config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    StrictDataclassClassValidationError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from intraslice.checkpoint.composite import text_arguments, text_config
from intraslice.checkpoint.folder import config_reason, read_headers, weight_files
from intraslice.checkpoint.ownership import check_intact
from intraslice.checkpoint.source import find_built_in, resolve_model
from intraslice.errors import CheckpointError
from intraslice.names import NameKind, kind_of
from intraslice.placement import choose_device, dtype_from_name
from intraslice.progress import Progress
from intraslice.quiet import quiet
from intraslice.runtime import register
from intraslice.runtime.families_intraslice import FAMILIES

# What transformers raises for a config, tokenizer or weights that are missing, corrupt or not understood.
_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    HFValidationError,
    HfHubHTTPError,
)


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Read the config of a dense or pruned model, of a composite model that of its text tower.

    Raises:
        CheckpointError: there is no such model, its config cannot be read, or its folder holds no weights.
    """
    return text_config(load_whole_config(name, revision=revision, trust_remote_code=trust_remote_code)[0])


def load_whole_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, list[Path]]:
    """Read the config of a dense or pruned model; no weights are loaded, downloaded or converted.

    Returns:
        The transformers config, and the weight files when the model is on this machine.

    Raises:
        CheckpointError: there is no such model, its config cannot be read, or its folder holds no weights.
    """
    register()
    extra: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    files: list[Path] = []
    source, path, kind = name, Path(name).expanduser(), kind_of(name)
    if kind is NameKind.FOLDER:
        files, source = weight_files(path, name), str(path)
    elif kind is NameKind.BUILT_IN or (kind is NameKind.FILE and path.suffix.lower() == ".gguf"):
        gguf = find_built_in(name) if kind is NameKind.BUILT_IN else path
        files, source, extra = [gguf], str(gguf.parent), {"gguf_file": gguf.name}
    elif kind is NameKind.FILE:
        raise CheckpointError(f"{name!r} is a file; give the folder it lies in, or a .gguf file")
    elif kind is NameKind.MISSING_PATH:
        raise CheckpointError(f"there is no folder or file {name!r}")
    try:
        with quiet("transformers"):
            return AutoConfig.from_pretrained(source, **extra), files
    except _LOADING_ERRORS as error:
        raise CheckpointError(_reason(name, error)) from error


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a dense or pruned model and its tokenizer, in evaluation mode; of a composite model the text tower alone.

    Args:
        name: hub id, local folder, .gguf file or built-in name.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto", "cpu" or a torch device.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: whether code that comes with the model may be executed.
        progress: shows the conversion of a GGUF file.

    Raises:
        CheckpointError: the model is missing, corrupt, unsafe, its weights do not fit its config, or a checkpoint that
            lists its files does not hold what was written.
        RecipeError: dtype or device is unknown.
    """
    register()
    chosen_device = choose_device(device)
    chosen_dtype: Any = "auto" if dtype == "auto" else dtype_from_name(dtype)
    folder = resolve_model(name, revision=revision, progress=progress)
    check_intact(folder, name)
    # Also finds truncated files, and refuses pickles.
    read_headers(folder, name)
    # The stubs know nothing of output_loading_info, with which a pair is returned.
    auto: Any = AutoModelForCausalLM
    try:
        with quiet("transformers"):
            tower = text_arguments(folder, trust_remote_code=trust_remote_code)
            model, info = auto.from_pretrained(
                folder,
                dtype=chosen_dtype,
                use_safetensors=True,
                **_names_arguments(folder, trust_remote_code),
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                **tower,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _LOADING_ERRORS as error:
        raise CheckpointError(_reason(name, error)) from error
    if "key_mapping" in tower:
        # transformers would save the tower under the names that it had in the composite, which nobody could load.
        model._weight_conversions = None
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills these with random numbers and goes on; a perplexity of that means nothing.
        raise CheckpointError(f"{name!r} lacks {len(missing)} weights, the first is {missing[0]!r}")
    return model.to(chosen_device).eval(), tokenizer


def _names_arguments(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Return what `from_pretrained` needs to find tensors that the family stores under other names; else nothing."""
    model_type = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).model_type
    renames = FAMILIES[model_type].renames if model_type in FAMILIES else ()
    return {"key_mapping": {f"^{re.escape(stored)}": known for stored, known in renames}} if renames else {}


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, StrictDataclassClassValidationError):
        return f"{name!r} cannot be loaded: {config_reason(error)}"
    # Messages of transformers run over many lines; the first one says what is wrong.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{name!r} cannot be loaded: {lines[0] if lines else type(error).__name__}"


def count_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
