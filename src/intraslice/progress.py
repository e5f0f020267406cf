"""How long work reports itself: one small interface, implemented with rich by the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Something that can show how far a step is."""

    def step(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open a step of `total` units; the yielded function advances it by a number of units."""
        ...

    def note(self, message: str) -> None:
        """Say one line that stays on the screen."""
        ...


class SilentProgress:
    """Progress for libraries and tests: shows nothing."""

    @contextmanager
    def step(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yield a function that does nothing."""
        yield lambda units: None

    def note(self, message: str) -> None:
        """Drop the message."""
