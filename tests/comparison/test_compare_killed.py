"""A comparison that is killed outright goes on where it stopped; each job is a process of its own here."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.small_comparison import document_of, write_yaml


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_kill_and_go_on(make_folder, tmp_path: Path):
    model = make_folder("llama", num_hidden_layers=24)
    calibration = {"source": "builtin", "num_samples": 64, "seqlen": 128}
    file = write_yaml(tmp_path / "c.yaml", model, calibration=calibration, methods=["naive"], sparsities=[0.3])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "intraslice", "compare", str(file), "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "1 of 2 cells are finished already" in again.stderr and "[2/2]" in again.stderr
    assert "resuming" in again.stderr and dense.stat().st_mtime_ns == measured
    assert [cell["asked"] for cell in document_of(out)["cells"]] == [0, 0.3]
    assert list((out / "checkpoints").iterdir()) == []
