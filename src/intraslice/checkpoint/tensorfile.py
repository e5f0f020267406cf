"""Safetensors files, written as a stream; whole under their final name or not there at all.

`safetensors.torch.save_file` wants every tensor of a file in memory at once, so the format is written here
tensor by tensor: 8 bytes with the length of a JSON header, the header, the raw tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from xxhash import xxh3_128

from intraslice.border import foreign
from intraslice.digests import SEAL, UNSEALED, bytes_digest, is_sealed_file
from intraslice.errors import CheckpointError, OutputError
from intraslice.files import temporary_beside, writing

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
_FOR = "for"
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSlot:
    """What will be stored under one name: dtype and shape, known before the data is."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the raw tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        path: safetensors file.
        name: its name in that file.
        dtype: safetensors code, for example "BF16".
        shape: its shape.
        digest: of its bytes, once it is known.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str | None = None

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class TensorFile:
    """A safetensors file that is written one tensor after the other.

    Attributes:
        names: of the tensors, in the order in which they have to be written.
        nbytes: size of the whole file.
        digest: of all bytes, as they were meant to be written; known after `close`, of a file without a seal.

    Args:
        path: final name; it exists only once `close` has returned.
        slots: name, dtype and shape of each tensor of the file.
        sealed_for: what the file is for, any text; it then holds this and the digest of itself, which `read_sealed`
            compares. Several processes may write such a file at the same time: the last one to finish stays.

    Raises:
        OutputError: the disk is full or the folder cannot be written; nothing is left behind.
    """

    def __init__(self, path: Path, slots: Mapping[str, TensorSlot], *, sealed_for: str | None = None) -> None:
        self.path = path
        # Wide dtypes first keep each tensor aligned, which readers that map the file rely on.
        self.names = sorted(slots, key=lambda name: -slots[name].dtype.itemsize)
        seal = {} if sealed_for is None else {SEAL: UNSEALED, _FOR: sealed_for}
        header: dict[str, Any] = {"__metadata__": {**seal, "format": "pt"}}
        self._slots = dict(slots)
        self._missing = list(reversed(self.names))
        self._sealed = sealed_for is not None
        end = 0
        for name in self.names:
            begin, end = end, end + slots[name].nbytes
            header[name] = {
                "dtype": _CODES[slots[name].dtype],
                "shape": list(slots[name].shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
        self.nbytes = len(text) + end
        self._seal_at = text.find(UNSEALED.encode())
        self._digest = xxh3_128(text)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        # What has a seal may lie in a folder that several runs share.
        self._temporary = temporary_beside(path, shared=self._sealed)
        with self._guard():
            self._file: IO[bytes] = open(self._temporary, "wb")
            self._file.write(text)

    @property
    def digest(self) -> str:
        """The digest of all bytes; with a seal, of all bytes but the seal."""
        return self._digest.hexdigest()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Store the next tensor; it must have the dtype and shape announced for `name`."""
        assert self._missing.pop() == name, f"{name} is not the next tensor of the file"
        slot = self._slots[name]
        assert (slot.dtype, slot.shape) == (tensor.dtype, tuple(tensor.shape)), name
        data = _raw(tensor)
        self._digest.update(data)
        with self._guard():
            self._file.write(data)

    def close(self) -> None:
        """Flush the file to the disk and give it its final name."""
        assert not self._missing, f"never written: {sorted(self._missing)}"
        with self._guard():
            if self._sealed:
                self._file.seek(self._seal_at)
                self._file.write(self.digest.encode())
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
            with writing(self.path):
                yield
        except OutputError:
            self.discard()
            raise


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, sealed_for: str | None = None) -> str:
    """Write one safetensors file: whole under its final name, or not at all.

    Args:
        path: the file; missing parent folders are made.
        tensors: what to store, any shapes and dtypes.
        sealed_for: what the file is for, any text; it then holds this and the digest of itself, which `read_sealed`
            compares.

    Returns:
        Digest of the file.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    slots = {name: TensorSlot(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFile(path, slots, sealed_for=sealed_for) as file:
        for name in file.names:
            file.write(name, tensors[name])
    return file.digest


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing or not a whole safetensors file.
    """
    with foreign(f"{str(path)!r} is truncated or corrupt", CheckpointError):
        return load_file(path)


def check_sealed(path: Path, sealed_for: str) -> None:
    """Check a file that was written with a seal.

    Args:
        path: the file.
        sealed_for: what it has to be for.

    Raises:
        CheckpointError: the file is missing, not what was written, or for something else.
    """
    try:
        with open(path, "rb") as file:
            head_bytes = 8 + int.from_bytes(file.read(8), "little")
        intact = head_bytes <= path.stat().st_size and is_sealed_file(path, head_bytes)
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error.strerror or error})") from error
    if not intact:
        raise CheckpointError(f"{str(path)!r} is not what was written")
    with safe_open(path, framework="pt") as file:
        if file.metadata().get(_FOR) != sealed_for:
            raise CheckpointError(f"{str(path)!r} was made for something else")


def read_sealed(path: Path, sealed_for: str) -> dict[str, torch.Tensor]:
    """Read all tensors of a file that was written with a seal.

    Args:
        path: the file.
        sealed_for: what it has to be for.

    Raises:
        CheckpointError: as `check_sealed`.
    """
    check_sealed(path, sealed_for)
    return read_tensors(path)


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Read one tensor of a safetensors file into memory of its own.

    Raises:
        CheckpointError: the file cannot be read, or has no such tensor.
    """
    # One opening a tensor: pages of the mapped file count as resident until it is closed.
    with (
        foreign(f"cannot read {name!r} from {str(path)!r}", CheckpointError),
        safe_open(path, framework="pt") as file,
    ):
        return file.get_tensor(name).clone()


def read_stored(stored: StoredTensor) -> torch.Tensor:
    """Read one tensor into memory of its own, as stored.

    Raises:
        CheckpointError: the file cannot be read, or the tensor is not the one whose digest is known.
    """
    tensor = read_tensor(stored.path, stored.name)
    if stored.digest is not None and bytes_digest(_raw(tensor)) != stored.digest:
        raise CheckpointError(
            f"{stored.name!r} in {str(stored.path)!r} has changed while it was in use; put the file back, and repeat "
            "the command."
        )
    return tensor


def _raw(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_slots(path: Path) -> dict[str, TensorSlot]:
    """Return what a safetensors file holds, from its header alone."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: TensorSlot(DTYPES[part.get_dtype()], tuple(part.get_shape())) for name, part in slices.items()}


def count_parameters(folder: Path) -> int:
    """Return how many numbers the weight files of a folder hold, indices not counted."""
    return sum(
        torch.Size(slot.shape).numel()
        for path in sorted(folder.glob("*.safetensors"))
        for slot in read_slots(path).values()
        if slot.dtype.is_floating_point
    )
