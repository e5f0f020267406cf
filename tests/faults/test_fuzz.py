"""Malformed inputs of every kind through the command line: a result or one sentence, and nothing else.

500 inputs by default, 10,000 with `-m slow`. What must not happen: a traceback, more than a minute, code of the input
that runs, a connection, a file that is left behind by a command that was refused, memory beyond that of the program.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf")

from support.fuzz import Ground, options
from support.small_comparison import run_here

EXTRA_MEMORY = 1 << 30
"""No file here has more than some 100 kB, so that this is all that a command may take."""
_connections: list[str] = []
_watched = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched and event in ("socket.connect", "socket.getaddrinfo", "os.system"):
        _connections.append(f"{event} {arguments!r}"[:200])


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    # An audit hook cannot be removed, but it can be told to look away.
    sys.addaudithook(_audit)
    patch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("fuzz")
    patch.setenv("INTRASLICE_CACHE", str(root / "cache"))
    run_here(patch)
    (root / "ground").mkdir()
    yield Ground(root / "ground")
    patch.undo()


def _memory() -> int:
    resource = pytest.importorskip("resource")
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _run(ground: Ground, inputs: int) -> None:
    global _watched
    counts: dict[int, int] = {}
    before = _memory()

    @settings(
        max_examples=inputs, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        target = data.draw(st.sampled_from((None, *ground.targets)))
        if target is None:
            outcome = ground.try_words(data.draw(options()))
        else:
            command = data.draw(st.sampled_from(target.commands))
            outcome = ground.try_file(target, data.draw(target.spoilt), command)
        assert not outcome.wrong, f"{outcome.words}\n{outcome.wrong}"
        assert not _connections
        counts[outcome.status] = counts.get(outcome.status, 0) + 1

    _watched = True
    try:
        one()
    finally:
        _watched = False
    more = _memory() - before
    print(f"{sum(counts.values())} inputs, by exit status {counts}, {more / 1e6:.0f} MB more at the peak")
    assert counts[2] > inputs / 4 and counts[0] > 0
    assert more < EXTRA_MEMORY
    assert ground.unchanged()


def test_malformed_inputs(ground: Ground) -> None:
    _run(ground, 500)


@pytest.mark.slow
def test_many_malformed_inputs(ground: Ground) -> None:
    _run(ground, 10_000)
