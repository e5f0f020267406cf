"""Which code made a result: a comparison must not reuse what an older working tree of the package has measured."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_SHOWS_ONLY = ("cli", "report")
"""Rooms that show numbers and never change one."""


@cache
def code_digest(package: Path = _PACKAGE) -> str:
    """Return a short hash of the names and the text of all Python files of the package that can change a number.

    Args:
        package: folder of the package.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        place = path.relative_to(package)
        if place.parts[0] not in _SHOWS_ONLY:
            # Lengths keep the end of one file apart from the beginning of the next.
            content = path.read_bytes()
            digest.update(f"{place.as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]
