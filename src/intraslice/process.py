"""Work in a process of its own: the memory is given back at the end, and the peak that is measured is its own.

Both sides speak JSON, one object per line, through the standard streams of the child. `Worker` is the side of the
parent; `main` is that of the child and hands over to a function `serve(requests, parent)`, named "module:function".

The standard multiprocessing module would run the main file of the user's program again in the child, and would look
for modules in the current working directory first; a folder with models may hold any file.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from intraslice.errors import IntraSliceError
from intraslice.progress import Progress, SilentProgress

# With -c the current working directory stands first in sys.path, as "", and Python 3.10 has no option against it. The
# package is loaded from where the parent has it, so that a parent which was started in its source folder is served too.
_START = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("intraslice", sys.argv[1])
sys.modules["intraslice"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["intraslice"])
from intraslice.process import main
main(sys.argv[2])
"""

Keep = Callable[[str, Any], None]
"""Is called with the name and the result of each part of an answer, as soon as it is finished."""


class Worker:
    """A child process that answers requests, one after the other; it ends with the `with` block, or with its parent.

    Args:
        serve: the function of the child, as "module:function".
        name: of the child in sentences, for example "the process that runs 'model'".
        error: what is raised when the child reports an error or dies.
    """

    def __init__(self, serve: str, *, name: str, error: type[IntraSliceError]) -> None:
        self._serve = serve
        self._name = name
        self._error = error

    def __enter__(self) -> Worker:
        # A file and not a pipe: nobody reads it until the process has died, and a full pipe would block it.
        self._messages = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        package = Path(__file__).with_name("__init__.py")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(package), self._serve],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            encoding="utf-8",
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._messages.close()

    def ask(self, request: dict[str, Any], progress: Progress | None = None, keep: Keep | None = None) -> Any:
        """Send a request and return its result.

        Args:
            request: JSON types.
            progress: shows the steps that the child reports.
            keep: is called with each finished part of the answer.

        Raises:
            IntraSliceError: of the type given to the class; the child failed, or its process died.
        """
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None and replies is not None
        try:
            requests.write(json.dumps(request) + "\n")
            requests.flush()
            return read_replies(replies, progress or SilentProgress(), self._error, keep)
        except (EOFError, BrokenPipeError):
            raise self._error(f"{self._name} died: {self._last_message()}") from None

    def _last_message(self) -> str:
        status = self._process.wait()
        self._messages.seek(0)
        lines = [line.strip() for line in self._messages if line.strip()]
        return lines[-1] if lines else f"exit status {status}"


def read_replies(
    lines: Iterable[str], progress: Progress, error: type[IntraSliceError], keep: Keep | None = None
) -> Any:
    """Act on the replies to a request and return its result.

    Args:
        lines: what the child has written.
        progress: shows the steps that the child reports.
        error: what is raised when the child reports an error.
        keep: is called with each finished part of the answer.

    Raises:
        IntraSliceError: of type `error`; the child reports an error.
        EOFError: the replies end without a result.
    """
    with _Steps(progress) as steps:
        for line in lines:
            if not line.endswith("\n"):
                break  # the child died while it was writing
            reply = json.loads(line)
            match reply.pop("kind"):
                case "done":
                    return reply["result"]
                case "error":
                    raise error(reply["sentence"])
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
    """The steps that are open in the child, shown by the progress of the parent."""

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


class Parent:
    """The parent as the child sees it: takes results, and shows progress.

    Args:
        write: takes one line, with its end.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._depth = 0

    def _send(self, kind: str, **content: Any) -> None:
        self._write(json.dumps({"kind": kind, **content}) + "\n")

    def done(self, result: Any) -> None:
        """Send the result of a request, in JSON types."""
        self._send("done", result=result)

    def part(self, name: str, result: Any) -> None:
        """Send a finished part of the answer, in JSON types."""
        self._send("part", name=name, result=result)

    def fail(self, sentence: str) -> None:
        """Send the sentence of an error instead of a result."""
        self._send("error", sentence=sentence)

    @contextmanager
    def step(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Open a step of `total` units; the yielded function advances it by a number of units."""
        depth, self._depth = self._depth, self._depth + 1
        self._send("step", description=description, total=total)
        try:
            yield lambda units: self._send("advance", depth=depth, units=units)
        finally:
            self._depth -= 1
            self._send("close")

    def note(self, message: str) -> None:
        """Say one line that stays on the screen."""
        self._send("note", message=message)


Serve = Callable[[Iterator[dict[str, Any]], Parent], None]


def answer(serve: Serve, requests: Iterator[dict[str, Any]], parent: Parent) -> None:
    """Serve requests until they end or one fails; errors of ours and of the system reach the parent as a sentence."""
    try:
        serve(requests, parent)
    except (IntraSliceError, OSError) as error:
        # The second: a file that cannot be read, or a name that no file can have.
        parent.fail(" ".join(str(error).split()))


def main(serve: str) -> None:
    """Be the child: answer what standard input asks.

    Args:
        serve: "module:function".
    """
    # Libraries that print must not end up between the replies: file descriptor 1 becomes standard error.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8") as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read_requests, args=(lines,), daemon=True).start()
        module, _, function = serve.partition(":")
        requests = (json.loads(line) for line in iter(lines.get, b""))
        answer(getattr(importlib.import_module(module), function), requests, Parent(replies.write))


def _read_requests(lines: queue.SimpleQueue[bytes]) -> None:
    """Pass on the lines of standard input, and end the process with it.

    When standard input ends, the parent is gone, and so must be this process, also in the middle of its work: nobody
    else may write into the same folder.
    """
    # Not through sys.stdin, whose lock would be held when the interpreter ends.
    pending = b""
    while block := os.read(0, 1 << 16):
        *whole, pending = (pending + block).split(b"\n")
        for line in whole:
            lines.put(line)
    os._exit(1)
