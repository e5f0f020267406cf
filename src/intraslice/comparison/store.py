"""Finished work on disk: one file per part and one per finished cell, each written whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from intraslice.comparison.cells import HEAL, PRUNE, Work, digest
from intraslice.errors import CheckpointError, OutputError
from intraslice.files import write_text
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
        content = _read(self._part_path(name, identity))
        return None if content is None else content["result"]

    def keep_part(self, name: str, identity: dict[str, Any], result: Any) -> None:
        """Write the result of a part, with what decided it."""
        content = {"identity": identity, "result": result}
        write_text(self._part_path(name, identity), json.dumps(content, indent=1))

    def cell(self, work: Work) -> dict[str, Any] | None:
        """Return a finished cell as it stands in the document, or None."""
        return _read(self._cell_path(work))

    def keep_cell(self, work: Work, cell: dict[str, Any]) -> None:
        """Write a finished cell."""
        write_text(self._cell_path(work), json.dumps(cell, indent=1))

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
        """Delete the models of a cell, whole or unfinished."""
        folders = [self.checkpoint(work), *([self.healed(work)] if HEAL in work.identities else [])]
        for folder in folders:
            for path in (folder, folder.with_name(folder.name + ".partial")):
                shutil.rmtree(path, ignore_errors=True)

    def _part_path(self, name: str, identity: dict[str, Any]) -> Path:
        return self.folder / "parts" / f"{name}-{digest(identity)}.json"

    def _cell_path(self, work: Work) -> Path:
        return self.folder / "cells" / f"{work.key}.json"


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is not readable ({error}); delete it to measure it again.") from error
