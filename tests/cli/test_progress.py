"""What is seen of long work: a line a minute where there is no terminal, JSON lines, and how it ends when stopped."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from intraslice.cli import app
from intraslice.cli.app import main
from intraslice.cli.console import ConsoleProgress, Stopped, stop_signals


def test_a_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleProgress(interval=0.05) as progress, progress.step("layers", 4) as advance:
        advance(1)
        with progress.step("attention", 2) as deeper:
            deeper(1)
            time.sleep(0.3)
    lines = " ".join(capsys.readouterr().err.split())
    assert "layers: 1 of 4 in 0.1 s, 0.1 s each, about 0.1 s left, attention 1 of 2" in lines.replace("0.2", "0.1")
    assert "layers: 1 of 4 in 0." in lines


def test_progress_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleProgress(log_json=True, interval=0.05) as progress, progress.step("layers", 4) as advance:
        advance(2)
        with progress.step("attention", 2) as deeper:
            deeper(1)
            time.sleep(0.2)
        progress.note("said")
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["event"] for event in (events[0], *events[-2:])] == ["begin", "note", "end"]
    seen = next(event for event in events if event["event"] == "progress")
    assert (seen["step"], seen["done"], seen["total"]) == ("layers", 2, 4)
    assert seen["within"] == [{"step": "attention", "done": 1, "total": 2}]
    # Two units of four and a half one within are done.
    assert seen["seconds_left"] == pytest.approx(seen["seconds"] * 1.5 / 2.5, abs=0.01)
    assert all("T" in event["time"] for event in events)


def test_errors_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["export", str(tmp_path), "--to", "padded", "-o", str(tmp_path / "out"), "--log-json"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "error"


@pytest.mark.parametrize(("number", "status", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "")])
def test_a_signal_ends_the_work_with_what_to_do_next(
    number, status: int, name: str, monkeypatch, capsys, tmp_path, request
) -> None:
    def wait(*_: object, **__: object) -> None:
        (tmp_path / "out.partial").mkdir()
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        time.sleep(20)

    monkeypatch.setattr("intraslice.pruning.prune_recipe", wait)
    # A shell that starts the tests in the background has them ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    assert main(["prune", "model", "-o", str(tmp_path / "out"), "--sparsity", "0.3"]) == status
    err = capsys.readouterr().err
    assert f"what is finished is in {tmp_path / 'out.partial'}: repeat the command with --resume" in err
    assert err.startswith(f"stopped by {name}; " if name else "interrupted; ")


def test_signals_are_given_back_and_a_second_one_kills() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"), stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == before
    with stop_signals(), pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "status", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "")])
def test_a_signal_of_which_a_library_makes_an_error(
    number, status: int, name: str, monkeypatch, capsys, tmp_path, request
) -> None:
    def wait(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as stopped:
            raise ValueError("building a validator failed") from stopped

    monkeypatch.setattr("intraslice.pruning.prune_recipe", wait)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    assert main(["prune", "model", "-o", str(tmp_path / "out"), "--sparsity", "0.3"]) == status
    how = f"stopped by {name}" if name else "interrupted"
    assert capsys.readouterr().err == f"{how}; repeat the command; what is finished is kept.\n"


def test_the_statuses_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("Exit status", "0 done", "143"):
        assert word in text
    assert app.ERROR_STATUS == 2
