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

from intraslice.errors import OutputError
from intraslice.files import writing

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
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


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
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.with_name(f".{path.name}.tmp")
        with self._guard():
            self._file: IO[bytes] = open(self._temporary, "wb")
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
            with writing(self.path):
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
