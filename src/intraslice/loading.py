"""Load a saved model, dense or pruned, to use it or to look at its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from intraslice.border import foreign
from intraslice.checkpoint.composite import load_arguments, text_config
from intraslice.checkpoint.config_file import check_layers, make_config, read_config_data
from intraslice.checkpoint.folder import StoredTensor, read_headers, weight_files
from intraslice.checkpoint.gguf import read_gguf_config
from intraslice.checkpoint.ownership import check_intact
from intraslice.checkpoint.source import config_folder, find_built_in, resolve_model
from intraslice.checkpoint.tokenizer import open_tokenizer
from intraslice.errors import CheckpointError
from intraslice.names import NameKind, expanded, kind_of
from intraslice.placement import choose_device, dtype_from_name
from intraslice.progress import Progress
from intraslice.quiet import quiet
from intraslice.runtime import register

_MISSING = 1 << 24
"""Parameters that may be missing without a word about memory."""


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
    path, kind = expanded(name), kind_of(name)
    if kind is NameKind.BUILT_IN or (kind is NameKind.FILE and path.suffix.lower() == ".gguf"):
        gguf = find_built_in(name) if kind is NameKind.BUILT_IN else path
        return read_gguf_config(gguf, name), [gguf]
    if kind is NameKind.FOLDER:
        files = weight_files(path, name)
        return _config(path, name, read_headers(path, name), trust_remote_code), files
    folder = config_folder(name, revision)
    return _config(folder, name, None, trust_remote_code, hub_id=name, revision=revision), []


def _config(
    folder: Path,
    name: str,
    tensors: dict[str, StoredTensor] | None,
    trust_remote_code: bool,
    *,
    hub_id: str | None = None,
    revision: str | None = None,
) -> Any:
    """Return the config of a folder; of a hub model whose code may run, whose code is not in that folder yet."""
    data = read_config_data(folder, name)
    if tensors is not None:
        check_layers(data, tensors, name)
    if not (trust_remote_code and "auto_map" in data):
        return make_config(data, name)
    with foreign(f"config.json of {name!r} is not valid", CheckpointError), quiet("transformers"):
        return AutoConfig.from_pretrained(hub_id or folder, revision=revision, trust_remote_code=True)


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
    tensors = read_headers(folder, name)
    config = _config(folder, name, tensors, trust_remote_code)
    arguments = load_arguments(config)
    check_size(arguments["config"], tensors, name, trust_remote_code=trust_remote_code)
    # The stubs know nothing of output_loading_info, with which a pair is returned.
    auto: Any = AutoModelForCausalLM
    with foreign(f"{name!r} cannot be loaded", CheckpointError), quiet("transformers"):
        model, info = auto.from_pretrained(
            folder,
            dtype=chosen_dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **arguments,
        )
    tokenizer = open_tokenizer(folder, name, config, trust_remote_code=trust_remote_code)
    if arguments["config"] is not config:
        # transformers would save the tower under the names that it had in the composite, which nobody could load.
        model._weight_conversions = None
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills these with random numbers and goes on; a perplexity of that means nothing.
        raise CheckpointError(f"{name!r} lacks {len(missing)} weights, the first is {missing[0]!r}")
    model = model.to(chosen_device).eval()
    with foreign(f"{name!r} cannot be run", CheckpointError), quiet("transformers"), torch.inference_mode():
        # What its config asks for may fit its weights, but not each other.
        model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=model.device))
    return model, tokenizer


def check_size(config: Any, tensors: dict[str, StoredTensor], name: str, *, trust_remote_code: bool = False) -> None:
    """Refuse a config whose model would need more memory than its weight files can fill; nothing is allocated before.

    Args:
        config: of the model that will be loaded.
        tensors: what is stored.
        name: how messages call the model.
        trust_remote_code: whether code of the model may run.

    Raises:
        CheckpointError: the model has far more parameters than numbers are stored, or cannot be built.
    """
    with foreign(f"config.json of {name!r} is not valid", CheckpointError), torch.device("meta"), quiet("transformers"):
        needed = count_parameters(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    # Quantised numbers are stored several to one.
    each = 8 if getattr(config, "quantization_config", None) is None else 64
    stored = sum(tensor.num_elements for tensor in tensors.values()) * each // 8
    # What is merely missing is named later, one tensor at a time.
    if needed > 2 * stored + _MISSING:
        raise CheckpointError(
            f"config.json of {name!r} asks for {needed} parameters, but its weight files hold {stored} numbers; check "
            "that config and weights belong together"
        )


def count_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
