"""Progress that keeps what it is told, and progress that interrupts the run like Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from intraslice.progress import SilentProgress


class Notes(SilentProgress):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class StopAt(Notes):
    """Interrupts the run when a step has advanced by more than so many units."""

    def __init__(self, description: str, units: int) -> None:
        super().__init__()
        self.description, self.left = description, units

    @contextmanager
    def step(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        def advance(units: int) -> None:
            if description == self.description:
                self.left -= units
                if self.left < 0:
                    raise KeyboardInterrupt

        yield advance
