"""A comparison that is killed outright, with its jobs in processes of their own, goes on where it stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from intraslice.cli.app import main
from support.small_comparison import document_of, run_here, write_yaml
from support.text import WORDS


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_kill_and_go_on(make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    model = make_folder("llama", num_hidden_layers=24)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number}. {WORDS}" for number in range(100)))
    calibration = {"source": str(text), "num_samples": 64, "seqlen": 64}
    evaluation = {"text": str(text), "seqlen": 64, "windows": 2}
    file = write_yaml(
        tmp_path / "c.yaml",
        model,
        calibration=calibration,
        evaluation=evaluation,
        methods=["naive"],
        sparsities=[0.3],
    )
    out = tmp_path / "out"
    command = ["compare", str(file), "-o", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "intraslice", *command],
        # As many threads as this process has, which goes on with the work.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    finished_layers = "checkpoints/*.partial/layers/*"
    while not list(out.glob(finished_layers)) and process.poll() is None and time.monotonic() < deadline:
        # Looking more often would take the processor from what is waited for.
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    (partial,) = out.glob("checkpoints/*.partial")
    # The process that pruned ends with the one that started it.
    time.sleep(0.5)
    layers = len(list((partial / "layers").iterdir()))
    time.sleep(0.5)
    assert len(list((partial / "layers").iterdir())) == layers < 24
    (dense,) = (out / "parts").iterdir()
    measured = dense.stat().st_mtime_ns
    run_here(monkeypatch)
    assert main(command) == 0
    said = capfd.readouterr().err
    assert "1 of 2 cells are finished already" in said and "[2/2]" in said
    assert "resuming" in said and dense.stat().st_mtime_ns == measured
    assert [cell["asked"] for cell in document_of(out)["cells"]] == [0, 0.3]
    assert list((out / "checkpoints").iterdir()) == []
