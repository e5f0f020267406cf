"""Malformed inputs of every kind through the command line: a result or one sentence, and nothing else.

500 inputs by default, 10,000 with `-m slow`. What must not happen: a traceback, a process that dies, more than a
minute, code of the input that runs, a connection, a file that is left behind by a command that was refused, memory
beyond twice the file and 1 GB.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

pytest.importorskip("gguf")

from support.fuzz import Ground, options
from support.served import Server

_MOST_FINDINGS = 20


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """The folders; every command has been run on them as they are, and succeeds unless the model cannot have it."""
    found = Ground(tmp_path_factory.mktemp("fuzz"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTRASLICE_CACHE", str(tmp_path_factory.mktemp("cache")))
        outcomes = found.try_unspoilt(Server(found.root / "temporary"))
    assert not [outcome for outcome in outcomes if outcome.wrong]
    refused = [" ".join(outcome.words) for outcome in outcomes if outcome.ended.status]
    # Free shapes fit no stock class, and so short a healing may not help.
    assert all("--to stock" in words or words.startswith("heal ") for words in refused), refused
    return found


def _run(ground: Ground, inputs: int, number: int, findings: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Try so many inputs, drawn by the seed `number`.

    What goes wrong is kept in the folder `findings`, and the other inputs are tried as well.
    """
    server = Server(ground.root / "temporary")
    statuses: Counter[int] = Counter()
    slowest, largest = (0.0, ""), (0, "")
    wrong: list[str] = []

    @seed(number)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        nonlocal slowest, largest
        if len(wrong) >= _MOST_FINDINGS:
            return
        target = data.draw(st.sampled_from((None, *ground.targets)))
        content = b""
        if target is None:
            outcome = ground.try_words(data.draw(options()), server)
        else:
            command = data.draw(st.sampled_from(target.commands))
            content = data.draw(target.spoilt)
            outcome = ground.try_file(target, content, command, server)
        statuses[outcome.ended.status] += 1
        what = " ".join([*outcome.words[:2], f"with spoilt {target.name}" if target else ""])
        slowest = max(slowest, (outcome.ended.seconds, what))
        largest = max(largest, (outcome.ended.more_bytes, what))
        if outcome.wrong:
            (findings / f"{len(wrong)}").write_bytes(content)
            wrong.append(f"{len(wrong)}: {target and target.name}: {outcome.words}\n{outcome.wrong[-3000:]}")

    try:
        one()
    finally:
        server.stop()
    with capfd.disabled():
        print(
            f"\n{statuses.total()} inputs: {statuses[2]} refused, {statuses[0]} accepted, {len(wrong)} wrong; at most "
            f"{slowest[0]:.1f} s ({slowest[1]}) and {largest[0] / 1e6:.0f} MB more ({largest[1]})"
        )
    assert not wrong, f"kept in {findings}:\n" + "\n\n".join(wrong)
    assert statuses[2] > inputs / 4 and statuses[0] > 0
    assert ground.unchanged()


def test_malformed_inputs(ground: Ground, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _run(ground, 500, 0, tmp_path, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 21))
def test_many_malformed_inputs(number: int, ground: Ground, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """10,000 in twenty parts, so that they can run side by side."""
    _run(ground, 500, number, tmp_path, capfd)
