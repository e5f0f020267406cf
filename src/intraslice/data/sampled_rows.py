"""Rows that were sampled from a model, kept on disk in the batches in which they were sampled.

An interrupted sampling goes on after its last whole batch, and a request for more rows begins with what a smaller one
left. A batch is used only where the same rows would be sampled side by side again: numbers round in another way in
other batches, and what comes out must not depend on what lies on the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from intraslice.errors import OutputError
from intraslice.files import write_text


class SampledRows:
    """The kept batches of one request.

    Args:
        folder: where they lie, one file each; of this very model. None keeps nothing.
        decides: all that decides the rows besides the model and their sources, as JSON types.
        sources: what each row is sampled from.
    """

    def __init__(self, folder: Path | None, decides: Sequence[str | int | None], sources: Sequence[str]):
        self._folder = folder
        self._decides = list(decides)
        self._sources = list(sources)

    def read(self, start: int) -> torch.Tensor | None:
        """Return the batch that begins with row `start`, int64 [B, T]; None where it must be sampled."""
        if self._folder is None:
            return None
        found = (self._read(self._file(start, last=last), start) for last in (True, False))
        return next((rows for rows in found if rows is not None), None)

    def _read(self, path: Path, start: int) -> torch.Tensor | None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            rows = torch.tensor(kept["tokens"], dtype=torch.int64)
            wanted = self._sources[start : start + kept["batch"]]
            usable = kept["fingerprint"] == fingerprint(rows) and kept["sources"] == wanted
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):
            # Not there, or spoilt by another program: sampling again is always possible.
            return None
        return rows if usable else None

    def write(self, start: int, rows: torch.Tensor, batch: int) -> None:
        """Keep a batch.

        Args:
            start: number of its first row.
            rows: token ids, [B, T].
            batch: rows that are sampled side by side where there are enough; the last batch may have fewer.
        """
        if self._folder is None:
            return
        sources = self._sources[start : start + len(rows)]
        content = {"batch": batch, "sources": sources, "tokens": rows.tolist(), "fingerprint": fingerprint(rows)}
        try:
            write_text(self._file(start, last=len(rows) < batch), json.dumps(content), shared=True)
        except OutputError:
            # A cache that cannot be written costs the next run some minutes, and this one nothing.
            return

    def _file(self, start: int, *, last: bool) -> Path:
        """Return where a batch lies; a last one that is not full does not replace the full one of a larger request."""
        assert self._folder is not None
        rest = [len(self._sources) - start] if last else []
        decides = json.dumps([*self._decides, start, self._sources[start], *rest])
        return self._folder / f"{hashlib.sha256(decides.encode()).hexdigest()[:32]}.json"


def fingerprint(tokens: torch.Tensor) -> str:
    """Return a sha256 of token ids [N, T]."""
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode())
    digest.update(tokens.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()
