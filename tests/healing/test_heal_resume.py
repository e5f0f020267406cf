"""An interrupted healing goes on to the same bytes, wherever it was interrupted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from intraslice.cli.app import main
from intraslice.results.result import PruneResult
from support.progress import StopAt


@pytest.mark.parametrize(
    ("family", "weights"),
    # Transposed matrices, and one fused matrix: others than the rest where LoRA is put and states are kept.
    [("llama", "full"), ("llama", "lora"), ("gpt2", "full"), ("gpt2", "lora"), ("falcon", "full"), ("falcon", "lora")],
)
def test_interrupted_at_several_steps(family, weights, pruned_folder, heal, tmp_path):
    folder = pruned_folder(family)
    whole = heal(folder, output=tmp_path / "whole", weights=weights)
    # Before the first saved state; between two; in the step of a measurement; in the last one.
    for tokens in (128, 700, 128, 500):
        with pytest.raises(KeyboardInterrupt):
            heal(folder, weights=weights, resume=True, progress=StopAt("healing (tokens)", tokens))
        assert not (tmp_path / "healed").exists()
    resumed = heal(folder, weights=weights, resume=True)
    assert read(tmp_path / "healed") == read(tmp_path / "whole")
    assert not (tmp_path / "healed.partial").exists()
    curves = [[(point.step, point.loss, point.kl) for point in run.record.curve] for run in (whole, resumed)]
    assert curves[0] == curves[1]
    seconds = [point.seconds for point in resumed.record.curve]
    assert seconds == sorted(seconds)


def test_interrupted_after_the_last_step(pruned_folder, heal, tmp_path, monkeypatch):
    from intraslice.healing import run

    heal(pruned_folder(), output=tmp_path / "whole")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "_write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            heal(pruned_folder())
    heal(pruned_folder(), resume=True)
    assert read(tmp_path / "healed") == read(tmp_path / "whole")


def test_a_time_budget_keeps_the_steps_that_it_began_with(pruned_folder, heal):
    with pytest.raises(KeyboardInterrupt):
        heal(pruned_folder(), budget="4s", progress=StopAt("healing (tokens)", 700))
    stop = StopAt("measuring the speed of a step", 0)
    assert heal(pruned_folder(), budget="4s", resume=True, progress=stop).record.steps >= 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_killed(pruned_folder, text, tmp_path, capfd):
    kill_and_compare(pruned_folder(), text, tmp_path, capfd, kills=2)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
@pytest.mark.parametrize("weights", ["full", "lora"])
def test_killed_ten_times(weights, pruned_folder, text, tmp_path, capfd):
    kill_and_compare(pruned_folder(), text, tmp_path, capfd, kills=10, weights=weights)


def kill_and_compare(folder, text, tmp_path, capfd, *, kills, weights="full"):
    """Kill a healing `kills` times at random points of its training, then let it end; compare with one in one go."""
    steps = 20 + 10 * kills

    def command(name: str, *more: str) -> list[str]:
        given = ["heal", str(folder), "-o", str(tmp_path / name)]
        given += ["--budget", str(steps * 128), "--calibration", str(text), "--seqlen", "32", "--held-out", "4"]
        return [*given, "--evaluate-every", "3", "--lr", "1e-3", "--weights", weights, *more]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    work = tmp_path / "killed.partial"
    chance = random.Random(0)
    states: set[str] = set()
    for count in range(kills):
        before = _states(work)
        process = subprocess.Popen(
            [sys.executable, "-m", "intraslice", *command("killed", "--resume")],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 600
        # Into the training of this process: until it has saved a state of its own, then a random moment more.
        while _states(work) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it was over before it could be killed for the {count + 1}. time"
        states |= _states(work)
        assert not (tmp_path / "killed").exists()
    assert states
    assert main(command("killed")) == 2
    assert "--resume" in capfd.readouterr().err
    for name, more in (("killed", ["--resume"]), ("whole", [])):
        assert main(command(name, *more)) == 0, capfd.readouterr().err
    assert read(tmp_path / "killed") == read(tmp_path / "whole")
    assert PruneResult.load(tmp_path / "killed").healing.curve[-1].step == steps
    assert not work.exists()


def _states(work):
    return {path.name for path in work.glob("checkpoint-*")} if work.exists() else set()


def read(folder):
    return (folder / "model.safetensors").read_bytes()
