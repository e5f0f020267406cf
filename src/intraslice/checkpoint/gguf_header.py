"""The header of a GGUF file, read with limits before any library sees the file.

Readers of this format believe its counts: a count of 2^60 keys, or a sparse file that is all zeros, keeps them busy
for hours. Here every count is compared with what is left of the file.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from intraslice.border import foreign
from intraslice.errors import CheckpointError

_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_DIMENSIONS = 8
_MAX_NAME = 1 << 10
_MAX_TEXT = 1 << 24
_SLACK = 1 << 16
"""Bytes that may follow the last tensor: padding."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says of itself.

    Attributes:
        fields: numbers and short texts by key; of a list its length.
        tensors: shape of each tensor by name, slowest dimension first.
    """

    fields: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    @property
    def num_blocks(self) -> int:
        """Number of decoder layers, by the names of the tensors."""
        numbers = [name.split(".")[1] for name in self.tensors if name.startswith("blk.")]
        return 1 + max((int(number) for number in numbers if number.isdecimal() and len(number) < 10), default=-1)

    def check_blocks(self, name: str) -> None:
        """Refuse a file whose number of layers is not that of its tensors.

        Raises:
            CheckpointError: `name` is how it calls the file.
        """
        blocks = self.fields.get(f"{self.fields.get('general.architecture')}.block_count")
        if blocks != self.num_blocks:
            raise CheckpointError(
                f"GGUF file {name!r} has block_count {blocks}, but its tensors are those of {self.num_blocks} layers; "
                "download it again"
            )


def read_header(path: Path, name: str) -> GGUFHeader:
    """Read and check the header of a GGUF file; the tensors stay unread.

    Args:
        path: the file.
        name: how messages call it.

    Raises:
        CheckpointError: it is no GGUF file, is cut off, or its counts and sizes contradict each other.
    """
    with foreign(f"GGUF file {name!r} is truncated or corrupt", CheckpointError, "; download it again"):
        with open(path, "rb") as file:
            header, end = _Reader(file, path.stat().st_size).header()
        surplus = path.stat().st_size - end
        if not 0 <= surplus <= _SLACK:
            raise ValueError(
                f"its tensors end at byte {end} of {path.stat().st_size}"
                if surplus > 0
                else f"its tensors need {-surplus} bytes more"
            )
    return header


class _Reader:
    """Takes a header apart; what is wrong is a ValueError."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size

    def header(self) -> tuple[GGUFHeader, int]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        size = self._left
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("I")) not in (2, 3):
            raise ValueError(f"its version is {version}, and 2 and 3 can be read")
        num_tensors, num_keys = self._count("Q", _MAX_TENSORS, 16), self._count("Q", _MAX_KEYS, 12)
        fields: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._text(_MAX_NAME)
            if key in fields:
                raise ValueError(f"it holds the key {key!r} twice")
            fields[key] = self._value(self._number("I"))
        tensors: dict[str, tuple[int, ...]] = {}
        last = 0
        for _ in range(num_tensors):
            tensor, shape = self._text(_MAX_NAME), self._shape()
            kind, offset = self._number("I"), self._number("Q")
            if tensor in tensors:
                raise ValueError(f"it holds the tensor {tensor!r} twice")
            block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            tensors[tensor] = shape
            last = max(last, offset + math.prod(shape) // block * num_bytes)
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= _SLACK:
            raise ValueError(f"its alignment is {alignment!r}")
        start = size - self._left
        # A file of a vocabulary alone has no tensors, and need not be padded for them.
        return GGUFHeader(fields, tensors), start + -start % alignment + last if tensors else start

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError("it ends within its header")
        self._left -= count
        return self._file.read(count)

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _count(self, code: str, limit: int, each: int) -> int:
        """Return a number of things of at least `each` bytes, which must fit into the rest of the file."""
        count = self._number(code)
        if count > limit or count * each > self._left:
            raise ValueError(f"it claims to hold {count} entries of a kind")
        return count

    def _text(self, limit: int) -> str:
        return self._take(self._count("Q", limit, 1)).decode("utf-8", "replace")

    def _shape(self) -> tuple[int, ...]:
        sizes = [self._number("Q") for _ in range(self._count("I", _MAX_DIMENSIONS, 8))]
        if math.prod(sizes) > self._left * 32:
            raise ValueError("a tensor is larger than the file")
        return tuple(reversed(sizes))

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text(_MAX_TEXT)
        if kind != _ARRAY:
            return self._number(_SCALARS[kind])
        inner = self._number("I")
        if inner == _TEXT:
            count = self._count("Q", _MAX_TEXT, 8)
            for _ in range(count):
                self._take(self._count("Q", _MAX_TEXT, 1))
            return count
        each = struct.calcsize(f"<{_SCALARS[inner]}")
        count = self._count("Q", _MAX_TEXT, each)
        self._take(count * each)
        return count
