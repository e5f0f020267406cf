"""Digests: are these bytes still the ones that were written?

XXH3 of 128 bits, in hexadecimal. It notices accidents, whatever they are, and is several times as fast as a disk. It
does not stop somebody who changes a file on purpose: who can change the file can change its digest as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from xxhash import xxh3_128

SEAL = "xxh3_128"
"""The name under which a file holds the digest of itself."""

UNSEALED = "0" * 32
"""What stands in the place of the digest while it is computed."""

_SEAL = re.compile(rb'"' + SEAL.encode() + rb'": ?"([0-9a-f]{32})"')
_BLOCK = 1 << 22


def bytes_digest(content: bytes | memoryview) -> str:
    """Return the digest of some bytes."""
    return xxh3_128(content).hexdigest()


def file_digest(path: Path) -> str:
    """Return the digest of the content of a file; a few megabytes of it are in memory at a time."""
    with open(path, "rb") as file:
        return range_digest(file, 0, None)


def range_digest(file: IO[bytes], begin: int, end: int | None) -> str:
    """Return the digest of the bytes of an open file from `begin` up to, but not including, `end`; None: to its end."""
    digest = xxh3_128()
    for block in _blocks(file, begin, end):
        digest.update(block)
    return digest.hexdigest()


def seal(text: str) -> str:
    """Return a text that holds `"xxh3_128": UNSEALED` with the digest of itself in its place."""
    return text.replace(UNSEALED, bytes_digest(text.encode()), 1)


def is_sealed(content: bytes) -> bool:
    """Return whether the content of a file is what it was when it was sealed."""
    found = _SEAL.search(content)
    if found is None:
        return False
    begin, end = found.span(1)
    digest = xxh3_128(content[:begin])
    digest.update(UNSEALED.encode())
    digest.update(memoryview(content)[end:])
    return digest.hexdigest().encode() == found.group(1)


def is_sealed_file(path: Path, head_bytes: int) -> bool:
    """Return whether a large file is what it was when it was sealed.

    Args:
        path: the file; a few megabytes of it are in memory at a time, besides its head.
        head_bytes: how long the part is that holds the digest.
    """
    with open(path, "rb") as file:
        head = file.read(head_bytes)
        found = _SEAL.search(head)
        if found is None:
            return False
        digest = xxh3_128(head[: found.start(1)])
        digest.update(UNSEALED.encode())
        digest.update(head[found.end(1) :])
        for block in _blocks(file, len(head), None):
            digest.update(block)
    return digest.hexdigest().encode() == found.group(1)


def _blocks(file: IO[bytes], begin: int, end: int | None) -> Iterator[bytes]:
    file.seek(begin)
    left = end - begin if end is not None else None
    while block := file.read(_BLOCK if left is None else min(_BLOCK, left)):
        yield block
        if left is not None:
            left -= len(block)
