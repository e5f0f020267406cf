"""Which files of a folder this program has written: these can be checked, and only these are replaced or deleted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from intraslice.digests import SEAL, UNSEALED, file_digest, is_sealed, seal
from intraslice.errors import CheckpointError, OutputError
from intraslice.files import write_text, writing

LIST_FILE = "intraslice_files.json"
"""Lies in every folder that was published, and names all files in it with their digests."""

CHECKPOINT_FILES = (
    LIST_FILE,
    *("config.json", "generation_config.json", "result.json", "healing.json", "README.md", "*_intraslice.py"),
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("tokenizer*.json", "tokenizer*.model", "tekken.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.*", "LICENSE*", "NOTICE*"),
    *("processor_config.json", "*preprocessor_config.json", "image_processor_config.json"),
    *("prefill.onnx", "decode.onnx", "weights.onnx.data"),
)
"""What a checkpoint may hold, as patterns; 0.1 wrote no list."""

_MAY_CHANGE = ("README.md", "LICENSE*", "NOTICE*")
_MAY_GO = (*_MAY_CHANGE, "result.json", "healing.json")


class FileList(BaseModel):
    """The content of `LIST_FILE`.

    Attributes:
        written_by: "intraslice".
        xxh3_128: digest of the list itself.
        run: what wrote the folder; its work folder has the same.
        files: digest of each file, by its name relative to the folder.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    written_by: str
    xxh3_128: str
    run: str
    files: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a folder is against its list. All names are relative to it.

    Attributes:
        intact: files that are what was written.
        changed: files that are something else now, the list itself included.
        missing: files that are not there any more.
        others: files that were not written with the folder.
    """

    intact: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def write_list(folder: Path, run: str = "") -> None:
    """Write down that all files of a folder, which is about to be published, are ours, and what they hold.

    Args:
        folder: with everything else in it.
        run: what wrote it.
    """
    with writing(folder):
        names = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        digests = {name: file_digest(path) for name, path in names.items() if name != LIST_FILE}
    content = {"written_by": "intraslice", SEAL: UNSEALED, "run": run, "files": digests}
    write_text(folder / LIST_FILE, seal(json.dumps(content, indent=1) + "\n"))


def read_list(folder: Path) -> FileList | None:
    """Return the list of a published folder; None when there is none, or it is not what was written."""
    try:
        content = (folder / LIST_FILE).read_bytes()
        listed = FileList.model_validate_json(content)
    except (OSError, ValidationError):
        return None
    return listed if is_sealed(content) and listed.written_by == "intraslice" else None


def verify_folder(folder: Path, name: str) -> Verification:
    """Compare every file of a published folder with what was written.

    Args:
        folder: a checkpoint, or what was exported or healed.
        name: how messages call it.

    Raises:
        CheckpointError: the folder has no list, so that nothing is known about it; or a file cannot be read.
    """
    if not (folder / LIST_FILE).is_file():
        raise CheckpointError(
            f"{name!r} has no {LIST_FILE} with the digests of its files, so that it cannot be verified: it was written "
            "by intraslice 0.1 or by another program."
        )
    listed = read_list(folder)
    if listed is None:
        return Verification(changed=(LIST_FILE,))
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    try:
        same = {file for file, digest in listed.files.items() if file in found and file_digest(found[file]) == digest}
    except OSError as error:
        raise CheckpointError(f"{name!r} cannot be read: {error.filename!r}: {error.strerror or error}") from error
    return Verification(
        intact=(LIST_FILE, *sorted(same)),
        changed=tuple(file for file in sorted(listed.files) if file in found and file not in same),
        missing=tuple(file for file in sorted(listed.files) if file not in found),
        others=tuple(file for file in found if file not in listed.files and file != LIST_FILE),
    )


def check_intact(folder: Path, name: str) -> None:
    """Refuse a published folder that does not hold what was written; one without a list cannot be judged, and passes.

    A model card or a licence may be changed, and the records may be left out.

    Args:
        folder: a checkpoint, or what was exported or healed.
        name: how messages call it.

    Raises:
        CheckpointError: with the first file that is damaged, missing, or takes the place of a weight file.
    """
    if not (folder / LIST_FILE).is_file():
        return
    found = verify_folder(folder, name)
    advice = f"get it again, or delete {LIST_FILE} in it if that was done on purpose."
    for file in found.changed:
        if not matches(file, _MAY_CHANGE):
            raise CheckpointError(f"{file!r} of {name!r} is not what was written: it is damaged or changed; {advice}")
    for file in found.missing:
        if not matches(file, _MAY_GO):
            raise CheckpointError(f"{file!r} of {name!r} is missing; {advice}")
    for file in found.others:
        if matches(file, ("model*.safetensors", "model.safetensors.index.json")):
            raise CheckpointError(f"{file!r} in {name!r} was not written with it, but would be loaded; {advice}")


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a relative name matches a pattern, folder by folder: "*" stands for no "/"."""
    parts = name.split("/")
    for pattern in patterns:
        wanted = pattern.split("/")
        if len(wanted) == len(parts) and all(map(fnmatchcase, parts, wanted)):
            return True
    return False


def check_ours(folder: Path) -> None:
    """Refuse to replace a published folder that holds anything which this program has not written.

    Raises:
        OutputError: with the first such file.
    """
    check_names(folder, _ours_in(folder))


def delete_published(folder: Path) -> None:
    """Delete what this program has published in a folder, and the folder itself if nothing else is in it."""
    if folder.is_symlink():
        # What it points at lies somewhere else, and was not made by whoever made the link.
        folder.unlink()
        return
    delete_ours(folder, _ours_in(folder), last=LIST_FILE)
    if not any(folder.iterdir()):
        folder.rmdir()


def _ours_in(folder: Path) -> Callable[[str], bool]:
    listed = read_list(folder)
    if listed is not None:
        return {LIST_FILE, *listed.files}.__contains__
    content, result = _read(folder / LIST_FILE), _read(folder / "result.json")
    if content.get("written_by") == "intraslice" and isinstance(content.get("files"), list):
        return {LIST_FILE, *map(str, content["files"])}.__contains__
    if "requested_sparsity" in result and "layers" in result and not content:
        return lambda name: name != LIST_FILE and matches(name, CHECKPOINT_FILES)
    return lambda name: False


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


def delete_ours(folder: Path, ours: Callable[[str], bool], *, last: str | None = None) -> None:
    """Delete files of ours in a folder, and the folders in it that are empty then.

    Args:
        folder: it stays itself.
        ours: whether a file may be deleted, by its name relative to the folder.
        last: the file that goes after everything else: what says that it is ours.
    """
    names = [name for name in (path.relative_to(folder).as_posix() for path in _files(folder)) if ours(name)]
    for name in names:
        if name != last:
            (folder / name).unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
    if last in names:
        (folder / last).unlink()


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
