"""Which files of a folder this program has written: only these are ever replaced or deleted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from intraslice.errors import OutputError
from intraslice.files import write_text

LIST_FILE = "intraslice_files.json"
"""Lies in every folder that was published, and names all files in it."""

# What 0.1, which wrote no list, put into a checkpoint.
_OF_0_1 = (
    *("config.json", "generation_config.json", "result.json", "README.md", "*_intraslice.py"),
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "spiece.model", "chat_template.*", "LICENSE*", "NOTICE*"),
)


def write_list(folder: Path) -> None:
    """Write down that all files of a folder, which is about to be published, are ours."""
    names = sorted(path.relative_to(folder).as_posix() for path in _files(folder))
    content = {"written_by": "intraslice", "files": [name for name in names if name != LIST_FILE]}
    write_text(folder / LIST_FILE, json.dumps(content, indent=1) + "\n")


def check_ours(folder: Path) -> None:
    """Refuse to replace a published folder that holds anything which this program has not written.

    Raises:
        OutputError: with the first such file.
    """
    content, result = _read(folder / LIST_FILE), _read(folder / "result.json")
    if content.get("written_by") == "intraslice" and isinstance(content.get("files"), list):
        listed = {LIST_FILE, *map(str, content["files"])}
        check_names(folder, listed.__contains__)
    elif "requested_sparsity" in result and "layers" in result:
        check_names(folder, lambda name: any(fnmatchcase(name, pattern) for pattern in _OF_0_1))
    else:
        check_names(folder, lambda name: False)


def check_names(folder: Path, ours: Callable[[str], bool]) -> None:
    """Refuse a folder with a file that is not ours.

    Args:
        folder: what --overwrite would replace.
        ours: whether a file was written by this program, by its name relative to the folder.

    Raises:
        OutputError: with the first file that was not.
    """
    for path in _files(folder):
        if not ours(path.relative_to(folder).as_posix()):
            raise OutputError(
                f"{str(folder)!r} holds {path.relative_to(folder).as_posix()!r}, which intraslice has not written, so "
                "--overwrite does not replace it; move that file away, or choose another output."
            )


def delete_ours(folder: Path, ours: Callable[[str], bool]) -> None:
    """Delete files of ours in a folder, and the folders in it that are empty then.

    Args:
        folder: it stays itself.
        ours: whether a file may be deleted, by its name relative to the folder.
    """
    for path in list(_files(folder)):
        if ours(path.relative_to(folder).as_posix()):
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


def _files(folder: Path) -> Iterator[Path]:
    """Yield what would be lost with a folder, in the order of the names; a link is a file, whatever it points at."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        else:
            yield path


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
