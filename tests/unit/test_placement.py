"""How time is taken: wall clock on a CPU, events on an accelerator (a made-up one here)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from intraslice import placement
from intraslice.placement import Placement, peak_resident_bytes


def _placement(device: str) -> Placement:
    return Placement(torch.device(device), torch.float32, torch.float32, torch.float32)


def test_wall_clock_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(placement.time, "perf_counter", lambda: next(clock))
    assert _placement("cpu").timed(lambda: "done") == (2.5, "done")


def test_events_on_an_accelerator(monkeypatch: pytest.MonkeyPatch):
    happened: list[str] = []

    class Event:
        def __init__(self, device: torch.device, enable_timing: bool) -> None:
            assert enable_timing
            self.name = "begin" if not happened else "end"
            happened.append(f"make {self.name}")

        def record(self, stream: str) -> None:
            happened.append(f"{self.name} on {stream}")

        def synchronize(self) -> None:
            happened.append(f"wait for {self.name}")

        def elapsed_time(self, other: Event) -> float:
            assert (self.name, other.name) == ("begin", "end")
            return 1500.0

    fake = SimpleNamespace(current_stream=lambda device: "stream", synchronize=lambda device: None)
    monkeypatch.setattr(torch, "accelerator", fake)
    monkeypatch.setattr(torch, "Event", Event)
    assert _placement("meta").timed(lambda: happened.append("work")) == (1.5, None)
    assert happened[2:] == ["begin on stream", "work", "end on stream", "wait for end"]


@pytest.mark.parametrize("name", ["current_device_index", "current_device_idx"])
def test_which_accelerator_under_both_names_that_torch_has_for_the_current_one(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "accelerator", SimpleNamespace(**{name: lambda: 2}))
    found = [placement.accelerator_index(torch.device(*device)) for device in (("cpu",), ("meta",), ("meta", 1))]
    assert found == [None, 2, 1]


def test_peak_memory_stays_when_memory_is_given_back():
    ballast = bytearray(80_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    peak = peak_resident_bytes()
    del ballast
    # The kernel counts in steps per thread, so the last digits may move.
    assert 80e6 < peak < 1.01 * peak_resident_bytes()


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd"])
def test_peak_memory_on_other_systems(platform: str, monkeypatch: pytest.MonkeyPatch):
    memory = SimpleNamespace(peak_wset=3_000_000)
    process = SimpleNamespace(memory_info=lambda: memory)
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: process))
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=5_000))
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(placement, "Path", lambda _: SimpleNamespace(exists=lambda: False))
    monkeypatch.setattr(placement.sys, "platform", platform)
    assert peak_resident_bytes() == {"darwin": 5_000, "win32": 3_000_000, "freebsd": 5_120_000}[platform]


UNIX = ("fcntl", "resource", "pwd", "grp", "termios")


def test_modules_import_without_those_that_only_unix_has():
    blocked = f"import sys; sys.modules.update(dict.fromkeys({UNIX}))"
    modules = "intraslice.placement, intraslice.process, filelock"
    subprocess.run([sys.executable, "-c", f"{blocked}; import {modules}"], check=True)


def test_no_module_needs_what_only_unix_has():
    # transformers cannot be imported without them where the system is Linux, so that most modules cannot be tried.
    files = list(Path(placement.__file__).parent.rglob("*.py"))
    assert len(files) > 50
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not set(names) & set(UNIX), f"{file} imports {names}"
