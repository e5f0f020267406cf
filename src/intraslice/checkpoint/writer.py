"""Writing tensors and whole checkpoint folders so that a file or folder under its final name is always complete.

safetensors files are written here tensor by tensor, because `safetensors.torch.save_file` wants every tensor of a
file in memory at once. The format: 8 bytes with the length of a JSON header, the header, the raw tensors.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open

from intraslice.errors import OutputError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Licence files travel with the weights because most model licences ask for it.
_SIDE_PATTERNS = (
    "tokenizer*.json",
    "tokenizer*.model",
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


@dataclass(frozen=True)
class TensorSlot:
    """What will be stored under one name: dtype and shape, known before the data is."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the raw tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorFile:
    """A safetensors file that is written one tensor after the other, in any order.

    Args:
        path: final name; it exists only once `close` has returned.
        slots: name, dtype and shape of each tensor of the file.

    Raises:
        OutputError: the disk is full or the folder cannot be written; nothing is left behind.
    """

    def __init__(self, path: Path, slots: Mapping[str, TensorSlot]) -> None:
        self.path = path
        # Wide dtypes first keep each tensor aligned, which readers that map the file rely on.
        ordered = sorted(slots, key=lambda name: -slots[name].dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._slots = dict(slots)
        self._offsets: dict[str, int] = {}
        end = 0
        for name in ordered:
            begin, end = end, end + slots[name].nbytes
            self._offsets[name] = begin
            header[name] = {
                "dtype": _CODES[slots[name].dtype],
                "shape": list(slots[name].shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.nbytes = 8 + len(text) + end
        self._start = 8 + len(text)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.with_name(f".{path.name}.tmp")
        with self._guard():
            self._file: IO[bytes] = open(self._temporary, "wb")  # noqa: SIM115 - closed by close or discard
            self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Store one tensor; it must have the dtype and shape announced for `name`."""
        slot = self._slots.pop(name)
        assert (slot.dtype, slot.shape) == (tensor.dtype, tuple(tensor.shape)), name
        data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        with self._guard():
            self._file.seek(self._start + self._offsets[name])
            self._file.write(data.data)

    def close(self) -> None:
        """Flush the file to the disk and give it its final name."""
        assert not self._slots, f"never written: {sorted(self._slots)}"
        with self._guard():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Drop what has been written."""
        if hasattr(self, "_file"):
            # A full disk makes close fail as well, because it flushes; the file is closed all the same.
            try:
                self._file.close()
            except OSError:
                pass
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            with _writing(self.path):
                yield
        except OutputError:
            self.discard()
            raise


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """Write one safetensors file: whole under its final name, or not at all.

    Args:
        path: the file; missing parent folders are made.
        tensors: what to store, any shapes and dtypes.

    Returns:
        Bytes written.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    slots = {name: TensorSlot(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFile(path, slots) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    return file.nbytes


def write_text(path: Path, text: str) -> None:
    """Write a text file in the same all-or-nothing way as `write_tensors`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OutputError:
        temporary.unlink(missing_ok=True)
        raise


def read_slots(path: Path) -> dict[str, TensorSlot]:
    """Return what a safetensors file holds, from its header alone."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {
            name: TensorSlot(DTYPES[part.get_dtype()], tuple(part.get_shape()))
            for name, part in slices.items()
        }


def assemble(
    folder: Path,
    layer_files: Sequence[Path],
    layer_prefixes: Sequence[str],
    rest: Mapping[str, torch.Tensor],
    max_shard_bytes: int,
) -> int:
    """Pack finished layers and all other tensors into the weight files of a checkpoint.

    One tensor of the layer files is in memory at a time. One shard is called model.safetensors; more get the
    usual numbered names and an index.

    Args:
        folder: checkpoint folder.
        layer_files: one safetensors file per layer, names relative to the layer.
        layer_prefixes: what to put before those names, for example "model.layers.3.".
        rest: all other tensors by full name; tied tensors only once.
        max_shard_bytes: a shard grows up to this size; one larger tensor gets a shard of its own.

    Returns:
        Bytes of the weight files.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    slots = {name: TensorSlot(tensor.dtype, tuple(tensor.shape)) for name, tensor in rest.items()}
    origin: dict[str, tuple[Path, str]] = {}
    for path, prefix in zip(layer_files, layer_prefixes, strict=True):
        for name, slot in read_slots(path).items():
            slots[prefix + name] = slot
            origin[prefix + name] = (path, name)

    shards = plan_shards(slots, max_shard_bytes)
    file_names = shard_names(len(shards))
    written = 0
    for file_name, names in zip(file_names, shards, strict=True):
        with TensorFile(folder / file_name, {name: slots[name] for name in names}) as file:
            for name in names:
                file.write(name, rest[name] if name in rest else _read_one(*origin[name]))
        written += file.nbytes
    if len(shards) > 1:
        write_index(folder, dict(zip(file_names, shards, strict=True)), slots)
    return written


def plan_shards(slots: Mapping[str, TensorSlot], max_shard_bytes: int) -> list[list[str]]:
    """Cut the names, in their order, into runs of at most `max_shard_bytes` of tensor data."""
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

    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        generation = tokenizer_source / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, folder / generation.name)
        else:
            GenerationConfig.from_model_config(config).save_pretrained(folder)
        for pattern in _SIDE_PATTERNS:
            for path in sorted(tokenizer_source.glob(pattern)):
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)
        if runtime_files:
            from intraslice.runtime import RUNTIME_FILES

            for path in RUNTIME_FILES:
                shutil.copyfile(path, folder / Path(path).name)


def check_output(out: Path, overwrite: bool, *, source: Path | None = None) -> None:
    """Refuse an output folder early, before any work is done.

    Args:
        out: where the checkpoint should appear.
        overwrite: whether an existing checkpoint may be replaced.
        source: folder of the model that is read; it is never replaced.

    Raises:
        OutputError: the folder exists, is not a checkpoint, is the model itself, or cannot be made.
    """
    if out.exists():
        if not overwrite:
            raise OutputError(
                f"output {str(out)!r} already exists; choose another folder or pass --overwrite"
            )
        if source is not None and out.resolve() == source.resolve():
            raise OutputError(f"output {str(out)!r} is the folder of the model itself; choose another folder")
        if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
            raise OutputError(
                f"output {str(out)!r} is not a checkpoint folder, so --overwrite does not replace it"
            )
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {str(out)!r} cannot be made: {str(parent)!r} is not a writable folder")


def publish(temp: Path, out: Path, overwrite: bool) -> None:
    """Give a finished folder its final name.

    Args:
        temp: finished folder on the same file system as `out`.
        out: final name.
        overwrite: replace an existing checkpoint; the old one is removed only after the new one is in place.

    Raises:
        OutputError: `out` exists and may not be replaced, or the rename fails; `temp` is left as it is.
    """
    check_output(out, overwrite)
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists():
            os.replace(temp, out)
            return
        attic = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.absolute().parent))
        os.replace(out, attic / out.name)
        try:
            os.replace(temp, out)
        except OSError:
            os.replace(attic / out.name, out)
            attic.rmdir()
            raise
        shutil.rmtree(attic)


def _read_one(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"the disk is full while writing {str(path)!r}; free some space or choose another folder"
            ) from error
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
