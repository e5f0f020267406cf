"""Work in a process of its own: what comes back from it, and what it never does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import intraslice
from intraslice.errors import CheckpointError, ComparisonError
from intraslice.process import Worker

CHILD = """
import os, signal, subprocess, sys
from intraslice.errors import RecipeError

def serve(requests, parent):
    for request in requests:
        match request["do"]:
            case "work":
                print("a library that prints")
                os.write(1, b"and one that writes without python\\n")
                subprocess.run([sys.executable, "-c", "print('a process of its own')"], check=True)
                with parent.step("outer", 2) as advance:
                    advance(1)
                    with parent.step("inner", 1) as deeper:
                        deeper(1)
                    advance(1)
                parent.note("half of it")
                parent.part("first", {"value": 1})
                parent.done(request["value"] * 2)
            case "refuse":
                raise RecipeError("two lines\\nof a sentence")
            case "kill":
                print("last words", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill silently":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crash":
                raise ZeroDivisionError("no sentence of ours")
            case "half a line":
                sys.stdout.flush()
                parent._write('{"kind": "done", "res')
                os.kill(os.getpid(), signal.SIGKILL)
            case "path":
                parent.done([sys.path, sys.modules["intraslice"].__file__])
"""


class _Seen:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def step(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        self.lines.append(f"open {description} {total}")
        yield lambda units: self.lines.append(f"{description} +{units}")
        self.lines.append(f"close {description}")

    def note(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    (tmp_path / "child_of_the_test.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    return Worker("child_of_the_test:serve", name="the process of the test", error=ComparisonError)


def test_results_parts_and_progress_come_back_and_output_does_not(worker: Worker, capfd):
    seen, parts = _Seen(), []
    with worker:
        for value in (2, 3):
            assert worker.ask({"do": "work", "value": value}, seen, lambda *part: parts.append(part)) == 2 * value
    assert parts == [("first", {"value": 1})] * 2
    once = ["open outer 2", "outer +1", "open inner 1", "inner +1", "close inner", "outer +1", "close outer"]
    assert seen.lines == [*once, "half of it"] * 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ("refuse", "two lines of a sentence"),
        ("kill", "the process of the test died: last words"),
        ("kill silently", "the process of the test died: exit status -9"),
        ("half a line", "the process of the test died: exit status -9"),
        ("crash", "the process of the test died: ZeroDivisionError: no sentence of ours"),
    ],
)
def test_what_goes_wrong_is_one_sentence(worker: Worker, request_: str, sentence: str):
    with worker, pytest.raises(ComparisonError) as caught:
        worker.ask({"do": request_})
    assert str(caught.value) == sentence


def test_a_process_that_cannot_start_says_why():
    with (
        Worker("intraslice.no_such_module:serve", name="the process", error=CheckpointError) as worker,
        pytest.raises(CheckpointError, match=r"the process died: ModuleNotFoundError: .*no_such_module"),
    ):
        worker.ask({})


def test_the_package_is_that_of_the_parent_and_the_current_folder_is_not_searched(worker: Worker):
    with worker:
        path, package = worker.ask({"do": "path"})
    assert "" not in path and os.getcwd() not in path
    assert package == intraslice.__file__


def test_it_ends_with_its_parent(tmp_path: Path):
    (tmp_path / "sleeper.py").write_text(
        "import os, time\n\ndef serve(requests, parent):\n    next(requests)\n"
        "    parent.done(os.getpid())\n    time.sleep(600)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom intraslice.errors import ComparisonError\nfrom intraslice.process import Worker\n"
        "worker = Worker('sleeper:serve', name='it', error=ComparisonError).__enter__()\n"
        "print(worker.ask({}), flush=True)\nos._exit(0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), _source()])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    pid = int(done.stdout)
    for _ in range(100):
        # A process that nobody has waited for stays in the table as a zombie.
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        subprocess.run(["sleep", "0.1"], check=True)
    pytest.fail("the child is still there ten seconds after its parent")


def _source() -> str:
    return str(Path(intraslice.__file__).parents[1])
