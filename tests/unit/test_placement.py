"""How time is taken: wall clock on a CPU, events on an accelerator (a made-up one here)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from intraslice import placement
from intraslice.placement import Placement


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
