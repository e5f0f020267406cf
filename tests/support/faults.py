"""Commands in forked processes that can be killed at any point; what they leave is compared with a whole run.

A forked process has torch already, so that a run of a tiny model takes a second and not ten.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from intraslice.checkpoint.ownership import LIST_FILE, verify_folder
from intraslice.cli.app import main

CAN_FORK = hasattr(os, "fork") and sys.platform != "darwin"
POINTS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "ftruncate")
"""Functions of `os` around which a run is killed."""

_CRASHED = 99
_TRACEBACK = 98
_TIMEOUT = 300


@dataclass
class Outcome:
    """How a process ended: its exit status, or minus the signal; and what it wrote to standard error."""

    status: int
    messages: str

    @property
    def crashed(self) -> bool:
        return self.status == _CRASHED


def run_forked(work: Callable[[], int], folder: Path, *, kill: tuple[float, int] | None = None) -> Outcome:
    """Run a function in a forked process.

    Args:
        work: returns the exit status.
        folder: the current directory of the process.
        kill: after how many seconds which signal is sent.
    """
    log = folder.parent / f"{folder.name}.log"
    # Here, because the child may be killed before it does anything.
    log.write_text("")
    child = os.fork()
    if child == 0:
        _be_the_child(work, folder, log)
    started = time.monotonic()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return Outcome(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"))
        spent = time.monotonic() - started
        if kill is not None and spent >= kill[0]:
            os.kill(child, kill[1])
            kill = None
        if spent > _TIMEOUT:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"no end after {_TIMEOUT} seconds: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.002)


def kill_when(work: Callable[[], int], folder: Path, reached: Callable[[], bool]) -> None:
    """Run a function in a forked process and kill it as soon as something is there."""
    log = folder.parent / f"{folder.name}.log"
    child = os.fork()
    if child == 0:
        _be_the_child(work, folder, log)
    deadline = time.monotonic() + _TIMEOUT
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, log.read_text(errors="replace")


def _be_the_child(work: Callable[[], int], folder: Path, log: Path) -> None:
    # What the parent has made is never collected here, which would copy all of its memory.
    gc.freeze()
    status = _TRACEBACK
    try:
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = work()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def command(*arguments: object) -> Callable[[], int]:
    """Return a function that runs a command line."""
    return lambda: main([str(argument) for argument in arguments])


@contextmanager
def around(action: Callable[[int], object]) -> Iterator[list[str]]:
    """Call an action before and after each function of `POINTS`, with the number of the point; yields their names."""
    names: list[str] = []
    found = {name: getattr(os, name) for name in POINTS if hasattr(os, name)}

    def wrapped(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            for when in ("before", "after"):
                if when == "after":
                    result = function(*args, **kwargs)
                names.append(f"{when} {name} {args[0] if args else ''}")
                action(len(names) - 1)
            return result

        return call

    for name, function in found.items():
        setattr(os, name, wrapped(name, function))
    try:
        yield names
    finally:
        for name, function in found.items():
            setattr(os, name, function)


def counted(work: Callable[[], int], folder: Path) -> tuple[list[int], int]:
    """Run a function in a forked process; return its points, and how many there are.

    Of several points with the same files on the disk only the first is returned: who comes afterwards sees nothing but
    the files.
    """
    report = folder.parent / f"{folder.name}.points"

    def count() -> int:
        seen: dict[str, int] = {}
        with around(lambda number: seen.setdefault(_state(folder), number)) as names:
            status = work()
            total = len(names)
        report.write_text(json.dumps([list(seen.values()), total]))
        return status

    done = run_forked(count, folder)
    assert done.status == 0, done.messages
    points, total = json.loads(report.read_text())
    return points, total


def _state(folder: Path) -> str:
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        state.update(f"{path.relative_to(folder)} {path.is_dir()} {len(content)} ".encode() + content)
    return state.hexdigest()


def crashing(work: Callable[[], int], point: int) -> Callable[[], int]:
    """Return a function that ends the process, as a kill would, at a point."""

    def crash(number: int) -> None:
        if number == point:
            os._exit(_CRASHED)

    def run() -> int:
        with around(crash):
            return work()

    return run


@dataclass
class Tally:
    """What a campaign has found, for the figures of the documentation."""

    points: int = 0
    cases: int = 0
    kills: int = 0
    identical: int = 0
    sentences: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass
class Scenario:
    """One command that is killed, and how it is repeated.

    Attributes:
        name: in messages.
        first: the command that is killed.
        again: the command that goes on, or starts again, afterwards.
        before: prepares a folder; runs once in this process for each case.
        results: what is compared with a whole run, by the names in the folder.
    """

    name: str
    first: Callable[[], int]
    again: Callable[[], int]
    before: Callable[[Path], None] = lambda folder: None
    results: Callable[[Path], dict[str, object]] = lambda folder: contents(folder)

    def whole(self, root: Path) -> dict[str, object]:
        """Return what a run without interruption leaves.

        It is done in this process, so that those that are forked afterwards have imported everything.
        """
        folder = self.prepared(root / f"{self.name}-whole")
        before = Path.cwd()
        os.chdir(folder)
        try:
            assert self.first() == 0
        finally:
            os.chdir(before)
        return self.results(folder)

    def prepared(self, folder: Path) -> Path:
        folder.mkdir()
        self.before(folder)
        return folder

    def finish(self, folder: Path, expected: dict[str, object], tally: Tally, what: str) -> None:
        """Repeat the command until it ends, and compare."""
        for _ in range(2):
            done = run_forked(self.again, folder)
            if done.status == 0:
                break
            sentence = done.messages.strip().splitlines()[-1] if done.messages.strip() else ""
            if done.status == 2 and "already exists" in sentence and "Traceback" not in done.messages:
                # Everything was done when it was killed.
                tally.sentences += 1
                break
            tally.failures.append(f"{self.name}, {what}: status {done.status}, {done.messages[-600:]}")
            return
        found = self.results(folder)
        if found == expected:
            tally.identical += 1
        else:
            differ = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
            values = {name: (str(expected.get(name))[-300:], str(found.get(name))[-300:]) for name in differ[:3]}
            tally.failures.append(f"{self.name}, {what}: differs in {values}")


def contents(folder: Path) -> dict[str, object]:
    """Return all files below a folder: by name their bytes, but of records only that they are there.

    Every checkpoint in it must be what its own list says.
    """
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[name] = "folder"
            continue
        timed = path.name in ("result.json", "README.md", LIST_FILE)
        found[name] = "record" if timed else path.read_bytes()
        if path.name == LIST_FILE:
            verified = verify_folder(path.parent, name)
            assert not (verified.changed or verified.missing or verified.others), (name, verified)
    return found


def kill_at_every_point(scenario: Scenario, root: Path, *, at_most: int | None = None, seed: int = 0) -> Tally:
    """Kill a command at its points, each time in a new folder, and finish it.

    Args:
        scenario: the command.
        root: folder for the cases.
        at_most: so many of its points, drawn by the seed; None takes all.
        seed: of the choice.
    """
    tally = Tally()
    expected = scenario.whole(root)
    points, total = counted(scenario.first, scenario.prepared(root / f"{scenario.name}-count"))
    tally.points = total
    if at_most is not None:
        points = sorted(random.Random(seed).sample(points, min(at_most, len(points))))
    for point in points:
        folder = scenario.prepared(root / f"{scenario.name}-{point}")
        done = run_forked(crashing(scenario.first, point), folder)
        assert done.crashed, f"{scenario.name} ended before its point {point} of {total}: {done.messages[-600:]}"
        tally.kills += 1
        scenario.finish(folder, expected, tally, f"killed at point {point} of {total}")
    return tally


def kill_at_random(scenario: Scenario, root: Path, *, kills: int, seed: int = 0) -> Tally:
    """Send signals at random moments, some of them to runs that go on, and finish each run.

    Args:
        scenario: the command.
        root: folder for the cases.
        kills: how many signals reach a running process.
        seed: of moments and signals.
    """
    tally, chance = Tally(), random.Random(seed)
    expected = scenario.whole(root)
    started = time.monotonic()
    assert run_forked(scenario.first, scenario.prepared(root / f"{scenario.name}-timed")).status == 0
    longest = time.monotonic() - started
    case = 0
    while tally.kills < kills:
        folder, work = scenario.prepared(root / f"{scenario.name}-{case}"), scenario.first
        case += 1
        sent = []
        for _ in range(chance.choice((1, 1, 2, 3))):
            which = chance.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            done = run_forked(work, folder, kill=(chance.uniform(0, longest), which))
            if done.status == 0 or (done.status == 2 and "already exists" in done.messages):
                break
            sent.append(which.name)
            tally.kills += 1
            if done.status == _TRACEBACK:
                tally.failures.append(f"{scenario.name}, {sent}: {done.messages[-600:]}")
            work = scenario.again
        if sent:
            tally.cases += 1
            scenario.finish(folder, expected, tally, f"case {case - 1}, {', '.join(sent)}")
    return tally


needs_fork = pytest.mark.skipif(not CAN_FORK, reason="needs processes that are forked")
