"""Command lines run one after the other in a forked process, which is watched while it runs them.

The process is replaced after some commands, so that none depends on what a hundred others have left in it, and its
memory can be told from that of the tests.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pytest

from intraslice import process
from intraslice.checkpoint import tokenizer
from intraslice.cli.app import main, parser
from intraslice.comparison import run
from intraslice.data import encoding
from intraslice.errors import IntraSliceError
from intraslice.progress import Progress, SilentProgress
from intraslice.speed import bench
from support.faults import CAN_FORK

MAX_SECONDS = 60
_COMMANDS = 200
_CONNECTIONS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "os.system")
_connections: list[str] = []
_watched = False


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status; -1 if it did not return.
        messages: what it wrote to standard error.
        traceback: of an exception that came out of it.
        compiled: what compiled code wrote to standard error by itself.
        died: how its process died, or that it did not end in time.
        seconds: how long it took.
        more_bytes: memory at its peak, more than at its start.
        connections: connections it tried, and shells it started.
    """

    status: int = -1
    messages: str = ""
    traceback: str = ""
    compiled: str = ""
    died: str = ""
    seconds: float = 0.0
    more_bytes: int = 0
    connections: list[str] = field(default_factory=list)


class Server:
    """Runs commands in a forked process, or in this one where no process can be forked.

    Args:
        temporary: where temporary files of the commands go.
    """

    def __init__(self, temporary: Path) -> None:
        self._temporary = temporary
        self._child = 0
        self._pipe: Connection | None = None
        self._left = 0
        # Not a pipe, which would be full at some time.
        self._errors = tempfile.TemporaryFile()

    def run(self, words: list[str]) -> Ended:
        """Run a command line to its end, at most `MAX_SECONDS`."""
        if not CAN_FORK:
            return self.run_here(words)
        if self._pipe is None or self._left == 0:
            self.stop()
            self._start()
        assert self._pipe is not None
        self._left -= 1
        self._pipe.send(words)
        try:
            # Second by second, so that a pause of the whole machine is not taken for a hang.
            if any(self._pipe.poll(1) for _ in range(MAX_SECONDS)):
                ended: Ended = self._pipe.recv()
                if "was given up" in ended.messages:
                    # Its thread goes on for ever.
                    self.stop()
                return ended
        except EOFError:
            return Ended(died=f"the process died: {self.stop()}")
        self.stop()
        return Ended(died=f"no end after {MAX_SECONDS} s", seconds=MAX_SECONDS)

    def run_here(self, words: list[str]) -> Ended:
        """Run a command line in this process: what it imports is there then in all that are forked afterwards."""
        with _prepared(self._temporary):
            return _run(words)

    def _start(self) -> None:
        parser()
        self._pipe, theirs = Pipe()
        self._left = _COMMANDS
        self._child = os.fork()
        if self._child == 0:
            self._pipe.close()
            with _prepared(self._temporary):
                _serve(theirs, self._errors)
        theirs.close()

    def stop(self) -> str:
        """End the process, if there is one; return how it ended."""
        if self._pipe is None:
            return ""
        self._pipe.close()
        self._pipe = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGKILL)
        _, status = os.waitpid(self._child, 0)
        return f"exit status {os.waitstatus_to_exitcode(status)}"


def _serve(pipe: Connection, errors: IO[bytes]) -> None:
    # What the parent has made is never collected here, which would copy all of its memory.
    gc.freeze()
    os.dup2(errors.fileno(), 2)
    try:
        while True:
            words = pipe.recv()
            os.ftruncate(2, 0)
            os.lseek(2, 0, os.SEEK_SET)
            ended = _run(words)
            errors.seek(0)
            pipe.send(replace(ended, compiled=errors.read().decode(errors="replace")))
    finally:
        os._exit(0)


@contextlib.contextmanager
def _prepared(temporary: Path) -> Iterator[None]:
    global _watched
    if not _watched:
        # It cannot be removed; this process does nothing else, or looks into the list only here.
        sys.addaudithook(_audit)
        _watched = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        for module in (run, bench):
            patch.setattr(module, "Worker", WorkerHere)
        for module in (tokenizer, encoding):
            # Otherwise it would be 50 for every input that is given up.
            patch.setattr(module, "MAX_SECONDS", 4)
        yield


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _CONNECTIONS:
        _connections.append(f"{event} {arguments!r}"[:200])


def _run(words: list[str]) -> Ended:
    _connections.clear()
    out, err = io.StringIO(), io.StringIO()
    status, trace = -1, ""
    begin = _reset_peak()
    start = time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except BaseException:
            trace = traceback.format_exc()
    return Ended(
        status=status,
        messages=err.getvalue(),
        traceback=trace,
        seconds=time.perf_counter() - start,
        more_bytes=_peak() - begin,
        connections=list(_connections),
    )


def _reset_peak() -> int:
    """Let the peak of the memory begin anew, where the system can do that; return what it is now, in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        resource = pytest.importorskip("resource")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


class WorkerHere:
    """Stands for `process.Worker`: a thread instead of a process, which has torch already and can be watched.

    An exception that is none of ours comes out of `ask`, where a real process would die with it.
    """

    def __init__(self, serve: str, *, name: str, error: type[IntraSliceError]) -> None:
        del name
        self._serve = serve
        self._error = error
        self._requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._failed: list[BaseException] = []

    def __enter__(self) -> WorkerHere:
        self._thread = threading.Thread(target=self._be_the_child)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._requests.put(None)
        self._thread.join()

    def _be_the_child(self) -> None:
        module, _, function = self._serve.partition(":")
        serve = getattr(importlib.import_module(module), function)
        try:
            process.answer(serve, iter(self._requests.get, None), process.Parent(self._replies.put))
        except BaseException as error:
            self._failed.append(error)
        self._replies.put(None)

    def ask(self, request: dict[str, Any], progress: Progress | None = None, keep: process.Keep | None = None) -> Any:
        """Do what `process.Worker.ask` does."""
        self._requests.put(request)
        try:
            return process.read_replies(iter(self._replies.get, None), progress or SilentProgress(), self._error, keep)
        except EOFError:
            raise RuntimeError("the child failed") from (self._failed[0] if self._failed else None)
