"""Whole checkpoint folders: packing finished layers into shards, the files beside them, the final rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from intraslice.checkpoint.ownership import check_ours, delete_published, write_list
from intraslice.checkpoint.tensorfile import DTYPES, StoredTensor, TensorFile, TensorSlot, read_slots, read_stored
from intraslice.errors import OutputError
from intraslice.files import write_text, writing
from intraslice.names import expanded

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OLD = "old"
"""Name, in a work folder, of an output that is being replaced."""

_GENERATION = "generation_config.json"
# Licence files travel with the weights because most model licences ask for it.
SIDE_PATTERNS = (
    "tokenizer*.json",
    "tokenizer*.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.*",
    "LICENSE*",
    "NOTICE*",
)


# Of composite models: what turns images and videos into tensors.
PROCESSOR_PATTERNS = (
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)


def assemble(
    folder: Path,
    layer_files: Sequence[Path],
    layer_prefixes: Sequence[str],
    rest: Mapping[str, torch.Tensor],
    max_shard_bytes: int,
    carried: Mapping[str, StoredTensor] | None = None,
) -> int:
    """Pack finished layers and all other tensors into the weight files of a checkpoint.

    One tensor of the layer files, and of what is carried over, is in memory at a time. One shard is called
    model.safetensors; more get the usual numbered names and an index.

    Args:
        folder: checkpoint folder.
        layer_files: one safetensors file per layer, names relative to the layer.
        layer_prefixes: what to put before those names, for example "model.layers.3.".
        rest: all other tensors by full name; tied tensors only once.
        max_shard_bytes: a shard grows up to this size; one larger tensor gets a shard of its own.
        carried: tensors that are copied from file to file as they are, by the names to store them under.

    Returns:
        Bytes of the weight files.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    slots = {name: TensorSlot(tensor.dtype, tuple(tensor.shape)) for name, tensor in rest.items()}
    origin: dict[str, StoredTensor] = {}
    for path, prefix in zip(layer_files, layer_prefixes, strict=True):
        for name, slot in read_slots(path).items():
            slots[prefix + name] = slot
            origin[prefix + name] = StoredTensor(path, name, "", slot.shape)
    for name, tensor in (carried or {}).items():
        slots[name] = TensorSlot(DTYPES[tensor.dtype], tensor.shape)
        origin[name] = tensor

    shards = plan_shards(slots, max_shard_bytes)
    file_names = shard_names(len(shards))
    written = 0
    for file_name, names in zip(file_names, shards, strict=True):
        with TensorFile(folder / file_name, {name: slots[name] for name in names}) as file:
            for name in file.names:
                file.write(name, rest[name] if name in rest else read_stored(origin[name]))
        written += file.nbytes
    if len(shards) > 1:
        write_index(folder, dict(zip(file_names, shards, strict=True)), slots)
    return written


def plan_shards(slots: Mapping[str, TensorSlot], max_shard_bytes: int) -> list[list[str]]:
    """Cut the names, in their order, into runs of at most `max_shard_bytes` of tensor data."""
    # `huggingface_hub.split_state_dict_into_shards_factory` works on sizes too, but it writes a tensor larger than a
    # shard before what precedes it and goes on with the shard that was open. Here the order of the names holds, so
    # that the files of a model are the same as those that were written before.
    shards: list[list[str]] = [[]]
    size = 0
    for name, slot in slots.items():
        if shards[-1] and size + slot.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += slot.nbytes
    return shards


def shard_names(num_shards: int) -> list[str]:
    """Return the file names that transformers expects for this number of shards."""
    if num_shards == 1:
        return [WEIGHTS_FILE]
    return [f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)]


def write_index(folder: Path, shards: Mapping[str, Sequence[str]], slots: Mapping[str, TensorSlot]) -> None:
    """Write the index that says which shard holds which tensor."""
    index = {
        "metadata": {"total_size": sum(slot.nbytes for slot in slots.values())},
        "weight_map": {name: file_name for file_name, names in shards.items() for name in names},
    }
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def save_side_files(folder: Path, config: Any, tokenizer_source: Path, *, runtime_files: bool = True) -> None:
    """Write everything but the weights: config, generation config, tokenizer, licence, modelling code.

    Args:
        folder: checkpoint folder, made if missing.
        config: Hugging Face config of the model to save.
        tokenizer_source: folder of the dense model.
        runtime_files: add the modelling files that `trust_remote_code=True` loads.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    from transformers import GenerationConfig

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        if not (tokenizer_source / _GENERATION).is_file():
            GenerationConfig.from_model_config(config).save_pretrained(folder)
        for path in side_files(tokenizer_source, composite=getattr(config, "text_config", None) is not None):
            shutil.copyfile(path, folder / path.name)
        if runtime_files:
            from intraslice.runtime import RUNTIME_FILES

            for path in RUNTIME_FILES:
                shutil.copyfile(path, folder / Path(path).name)


def side_files(folder: Path, *, composite: bool) -> list[Path]:
    """Return the files of a dense model that a pruned one takes over as they are.

    Args:
        folder: of the dense model.
        composite: whether it is a composite model.
    """
    patterns = (_GENERATION, *SIDE_PATTERNS, *(PROCESSOR_PATTERNS if composite else ()))
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def check_output(out: Path, overwrite: bool, *, source: Path | None = None) -> None:
    """Refuse an output folder early, before any work is done.

    Args:
        out: where the checkpoint should appear.
        overwrite: whether an existing checkpoint may be replaced.
        source: folder of the model that is read; it is never replaced.

    Raises:
        OutputError: the folder exists, holds a file that is not ours, is the model itself, or cannot be made.
    """
    if out.is_symlink() and not out.exists():
        raise OutputError(f"output {str(out)!r} is a link that leads nowhere; choose another folder")
    if out.exists():
        if not overwrite:
            raise OutputError(f"output {str(out)!r} already exists; choose another folder or pass --overwrite")
        if source is not None and out.resolve() == source.resolve():
            raise OutputError(f"output {str(out)!r} is the folder of the model itself; choose another folder")
        if not out.is_dir():
            raise OutputError(f"output {str(out)!r} is not a checkpoint folder, so --overwrite does not replace it")
        with writing(out):
            check_ours(out)
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {str(out)!r} cannot be made: {str(parent)!r} is not a writable folder")


def check_apart(output: Path, inputs: Mapping[str, str | Path]) -> None:
    """Refuse an output that would replace, or whose work folder holds, what is read.

    Args:
        output: the folder to write.
        inputs: what is read, by what it is called; names of things that are no files or folders here are passed over.

    Raises:
        OutputError: with the first input that lies there.
    """
    # realpath, because resolve stops at links that go round in circles.
    replaced = [os.path.realpath(folder) for folder in (output, output.with_name(f"{output.name}.partial"))]
    for what, given in inputs.items():
        path = expanded(str(given))
        real = Path(os.path.realpath(path))
        if os.path.lexists(path) and any(real.is_relative_to(folder) for folder in replaced):
            raise OutputError(
                f"the output {str(output)!r} would replace the {what}, {str(given)!r}, which lies in it or in its work "
                "folder; choose another output."
            )


def publish(temp: Path, out: Path, overwrite: bool, *, attic: Path | None = None, run: str = "") -> None:
    """Give a finished folder its final name.

    Args:
        temp: finished folder on the same file system as `out`.
        out: final name.
        overwrite: replace an existing checkpoint; the old one is removed only after the new one is in place.
        attic: where the old one is in between; beside `temp` unless given.
        run: what wrote the folder; stands in its list of files.

    Raises:
        OutputError: `out` exists and may not be replaced, or the rename fails; `temp` is left as it is.
    """
    check_output(out, overwrite)
    if temp.is_dir():
        write_list(temp, run)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists():
            os.replace(temp, out)
            return
        attic = attic or temp.with_name(OLD)
        os.replace(out, attic)
        try:
            os.replace(temp, out)
        except BaseException:
            os.replace(attic, out)
            raise
        delete_published(attic)
