"""Text files that are whole under their final name or not there at all, and one sentence for what can go wrong."""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from intraslice.errors import OutputError, RecipeError

SHARED_TEMPORARY = "." + "[0-9a-f]" * 8 + ".tmp"
"""Pattern of what `temporary_beside` puts behind the name of a shared file."""

_RESERVED_AT_ONCE = 1 << 24
_STALE_SECONDS = 24 * 3600


def temporary_beside(path: Path, *, shared: bool) -> Path:
    """Return the name under which a file is written before it gets its own.

    Args:
        path: the file.
        shared: whether several processes may write it at the same time. Each then takes a name of its own, or one would
            rename it away under the other's feet. Otherwise the next writer replaces what a killed one has left; of
            shared files it removes what is older than a day, which nobody is writing any more.
    """
    if not shared:
        return path.with_name(f".{path.name}.tmp")
    for left in path.parent.glob(f".*{path.suffix}{SHARED_TEMPORARY}"):
        # It may be finished, or removed by somebody else, meanwhile.
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a text file: whole under its final name, or not at all.

    Args:
        path: the file; missing parent folders are made.
        text: what it will hold, stored as UTF-8.
        shared: whether several processes may write it at the same time.

    Raises:
        OutputError: the name is that of a folder, the disk is full or the folder cannot be written; nothing is left
            behind.
    """
    if not path.name or path.is_dir():
        raise OutputError(f"{str(path)!r} is a folder; give the name of a file to write")
    temporary = temporary_beside(path, shared=shared)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OutputError:
        temporary.unlink(missing_ok=True)
        raise


def reserve(path: Path, num_bytes: int) -> None:
    """Make a file of this size whose space on the disk is really there.

    A mapped file without it kills the process when the disk turns out to be full in the middle of the work.

    Args:
        path: the file; what it holds is lost, its folder exists.
        num_bytes: its size.

    Raises:
        OutputError: the disk is too full, or the file cannot be written; nothing is left behind.
    """
    try:
        with writing(path), open(path, "wb") as file:
            if not _allocated(file.fileno(), num_bytes):
                zeros = bytes(min(num_bytes, _RESERVED_AT_ONCE))
                for begin in range(0, num_bytes, _RESERVED_AT_ONCE):
                    file.write(zeros[: num_bytes - begin])
    except OutputError:
        if path.is_file():
            path.unlink()
        raise


def _allocated(descriptor: int, num_bytes: int) -> bool:
    """Let the file system reserve the space; return False where system or file system cannot."""
    if num_bytes == 0 or not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise
    return True


def check_replaced(path: Path, *begins: str) -> None:
    """Refuse to write over a file that is something else than what it is replaced by; an empty one may be replaced.

    Args:
        path: the file to write.
        begins: how files of this kind begin; without any, none may be replaced.

    Raises:
        OutputError: there is another file, or a folder.
    """
    if not path.name or path.is_dir():
        raise OutputError(f"{str(path)!r} is a folder; give the name of a file to write")
    if path.is_file():
        with writing(path), open(path, "rb") as file:
            found = file.read(max(len(one.encode()) for one in ("", *begins)) + 1)
        if not begins or (found and not found.startswith(tuple(one.encode() for one in begins))):
            raise OutputError(
                f"{str(path)!r} exists and is something else than what would be written there; give another name"
            )


def check_home(name: str) -> None:
    """Refuse a path in the home folder of somebody who has none here.

    Raises:
        RecipeError: with the name.
    """
    try:
        Path(name).expanduser()
    except RuntimeError:
        raise RecipeError(
            f"there is no home folder for {Path(name).parts[0]!r} in {name!r}; write the whole path."
        ) from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of the operating system into one sentence about `path`.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"the disk is full while writing {str(path)!r}; free some space or choose another folder"
            ) from error
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
