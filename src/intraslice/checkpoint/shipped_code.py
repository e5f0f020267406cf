"""Whether the code in the folder of a pruned model is the code that this release ships."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from intraslice.runtime import RUNTIME_FILES

_MAX_BYTES = 1 << 22
CodeState = Literal["none", "shipped", "other"]


def runtime_digest(files: list[Path]) -> str:
    """Return a sha256 over names and contents of the files that travel with a checkpoint, ends of lines as one LF."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def code_in(folder: Path) -> tuple[CodeState, str]:
    """Say whose code a model folder holds; it is read, never run.

    Args:
        folder: of a dense or pruned model.

    Returns:
        "none" when there is no Python file; "shipped" when they are the files of the installed release and no others;
        else "other", which is code of another release or of a stranger. And the digest of the files, "" for none
        and for files that are too large to be any of ours.
    """
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".pyc", ".so", ".pyd") and path.is_file()]
    if not files:
        return "none", ""
    if any(path.stat().st_size > _MAX_BYTES for path in files):
        return "other", ""
    digest = runtime_digest(files)
    return ("shipped" if digest == runtime_digest(list(RUNTIME_FILES)) else "other"), digest
