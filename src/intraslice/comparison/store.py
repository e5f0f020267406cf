"""Finished work on disk: one file per part and one per finished cell, each written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from intraslice.checkpoint.ownership import delete_published
from intraslice.checkpoint.workfolder import WorkFolder, work_path
from intraslice.comparison.cells import HEAL, PRUNE, Work, digest
from intraslice.digests import SEAL, UNSEALED, is_sealed, seal
from intraslice.errors import CheckpointError, OutputError
from intraslice.files import write_text, writing
from intraslice.results.result import RESULT_FILE, PruneResult


class Store:
    """The folder of a comparison.

    Args:
        folder: made with the first file in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scans = folder / "scans"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second run out of the folder for the length of the block.

        Raises:
            OutputError: another run works in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"another comparison is running in {str(self.folder)!r}; wait for it or choose another folder."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def part(self, name: str, identity: dict[str, Any]) -> Any:
        """Return the result of a finished part, or None."""
        path = self._part_path(name, identity)
        content = _read(path)
        if content is None:
            return None
        if content["identity"] != json.loads(json.dumps(identity)):
            raise CheckpointError(f"{str(path)!r} was measured for something else; delete it to measure it again.")
        return content["result"]

    def keep_part(self, name: str, identity: dict[str, Any], result: Any) -> None:
        """Write the result of a part, with what decided it."""
        content = {"identity": identity, "result": result}
        _write(self._part_path(name, identity), content)

    def cell(self, work: Work) -> dict[str, Any] | None:
        """Return a finished cell as it stands in the document, or None."""
        content = _read(self._cell_path(work))
        return None if content is None else content["cell"]

    def keep_cell(self, work: Work, cell: dict[str, Any]) -> None:
        """Write a finished cell."""
        _write(self._cell_path(work), {"cell": cell})

    def parts(self, work: Work) -> dict[str, Any]:
        """Return the results of the finished parts of a cell."""
        found = {name: self.part(name, identity) for name, identity in work.identities.items()}
        if PRUNE in found and found[PRUNE] is None and (self.checkpoint(work) / RESULT_FILE).is_file():
            # Killed between the checkpoint and the file of the part.
            found[PRUNE] = PruneResult.load(self.checkpoint(work)).to_dict()
        if HEAL in found and found[HEAL] is None and (self.healed(work) / RESULT_FILE).is_file():
            healing = PruneResult.load(self.healed(work)).healing
            found[HEAL] = None if healing is None else healing.to_dict()
        return {name: result for name, result in found.items() if result is not None}

    def checkpoint(self, work: Work) -> Path:
        """Return the folder of the pruned model: readable, and named by all that decides it."""
        words = re.sub(r"[^A-Za-z0-9.+-]+", "-", work.cell.pruned_title).strip("-")
        return self.folder / "checkpoints" / f"{words}-{digest(work.identities[PRUNE])[:8]}"

    def healed(self, work: Work) -> Path:
        """Return the folder of the healed model of a cell that has one."""
        pruned = self.checkpoint(work)
        return pruned.with_name(f"{pruned.name}-healed-{digest(work.identities[HEAL])[:8]}")

    def drop_checkpoint(self, work: Work) -> None:
        """Delete the models of a cell, whole or unfinished, but nothing that others put into their folders."""
        folders = {"prune": self.checkpoint(work)}
        if HEAL in work.identities:
            folders["heal"] = self.healed(work)
        for kind, folder in folders.items():
            with writing(folder):
                if folder.is_dir():
                    delete_published(folder)
                if work_path(folder).is_dir():
                    WorkFolder(folder, kind).remove()

    def _part_path(self, name: str, identity: dict[str, Any]) -> Path:
        return self.folder / "parts" / f"{name}-{digest(identity)}.json"

    def _cell_path(self, work: Work) -> Path:
        return self.folder / "cells" / f"{work.key}.json"


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(path, seal(json.dumps({SEAL: UNSEALED, **content}, indent=1)))


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    content = path.read_bytes()
    if not is_sealed(content):
        raise CheckpointError(f"{str(path)!r} is not what was written; delete it to measure it again.")
    return json.loads(content)
