"""Runs a job of `worker.py` in a process of its own: memory is given back, and the peak is its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from intraslice.errors import ComparisonError
from intraslice.progress import Progress


def run_job(job: dict[str, Any], progress: Progress, keep: Callable[[str, Any], None] | None = None) -> Any:
    """Run a job and return its result.

    Args:
        job: JSON types; "job" names a function of `worker.py`, the rest are its arguments.
        progress: shows the steps of the job.
        keep: called with the name and result of each part as it is finished.

    Raises:
        ComparisonError: the job failed, or its process died.
    """
    # A file and not a pipe: nobody reads it until the process has died, and a full pipe would block it.
    with tempfile.TemporaryFile("w+", errors="replace") as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", "intraslice.comparison.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            # Its standard input stays open: the process ends itself when we are gone.
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            return read_replies(process.stdout, progress, keep)
        except (EOFError, BrokenPipeError):
            status = process.wait()
            messages.seek(0)
            lines = [line.strip() for line in messages if line.strip()]
            reason = lines[-1] if lines else f"exit status {status}"
            raise ComparisonError(f"the process of the job {job['job']!r} died: {reason}") from None
        finally:
            process.kill()
            process.communicate()


def read_replies(lines: Iterable[str], progress: Progress, keep: Callable[[str, Any], None] | None) -> Any:
    """Act on the replies of a job and return its result; the arguments are those of `run_job`.

    Raises:
        ComparisonError: the job failed.
        EOFError: the replies end without a result.
    """
    with _Steps(progress) as steps:
        for line in lines:
            reply = json.loads(line)
            match reply.pop("kind"):
                case "done":
                    return reply["result"]
                case "error":
                    raise ComparisonError(reply["sentence"])
                case "part" if keep is not None:
                    keep(reply["name"], reply["result"])
                case "step":
                    steps.open(**reply)
                case "advance":
                    steps.advance(**reply)
                case "close":
                    steps.close()
                case "note":
                    progress.note(reply["message"])
    raise EOFError


class _Steps:
    """The steps that are open in the child, opened again here."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._open: list[tuple[ExitStack, Callable[[int], None]]] = []

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self.close()

    def open(self, description: str, total: int) -> None:
        stack = ExitStack()
        self._open.append((stack, stack.enter_context(self._progress.step(description, total))))

    def advance(self, depth: int, units: int) -> None:
        self._open[depth][1](units)

    def close(self) -> None:
        self._open.pop()[0].close()
