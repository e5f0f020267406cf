"""Commands that are killed at every point where they change the disk, and at random moments.

Repeated, each ends with the same files as a run in one go, and leaves nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.faults import Scenario, Tally, kill_at_every_point, kill_at_random, needs_fork

pytestmark = needs_fork
Scenarios = Callable[[str], Scenario]

SCENARIOS = ("prune", "prune-on-disk", "overwrite", "resume", "export", "gguf", "compare", "heal")
RANDOM_KILLS = {"prune": 80, "prune-on-disk": 30, "overwrite": 40, "export": 20, "heal": 30}


def check(tally: Tally, capfd: pytest.CaptureFixture[str], name: str) -> None:
    with capfd.disabled():
        points = f"{tally.points} points, " if tally.points else f"{tally.cases} runs, "
        print(
            f"\n{name}: {points}{tally.kills} kills, {tally.identical} identical, {len(tally.failures)} not, "
            f"{tally.sentences} were finished already"
        )
    assert not tally.failures, "\n".join(tally.failures[:5])


@pytest.mark.parametrize("name", ["prune", "overwrite"])
def test_some_points(name: str, scenarios: Scenarios, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check(kill_at_every_point(scenarios(name), tmp_path, at_most=2), capfd, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_point(name: str, scenarios: Scenarios, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check(kill_at_every_point(scenarios(name), tmp_path), capfd, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM_KILLS)
def test_random_moments(name: str, scenarios: Scenarios, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check(kill_at_random(scenarios(name), tmp_path, kills=RANDOM_KILLS[name]), capfd, name)
