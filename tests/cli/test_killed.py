"""A run that is killed outright goes on from its last finished layer, to the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def _command(model: Path, out: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "intraslice", "prune", str(model), "-o", str(out), "--sparsity", "0.3"]
    command += ["--calibration", "builtin", "--num-samples", "64", "--seqlen", "128", "--set", "ffn.ffn_multiple=1"]
    return command + ["--set", "attention.head_multiple=2", *more]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_kill_and_resume(make_folder, tmp_path):
    model, killed, whole = make_folder("llama", num_hidden_layers=24), tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(_command(model, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first_layer = tmp_path / "killed.partial" / "layers" / "00000.safetensors"
    deadline = time.monotonic() + 600
    while not first_layer.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    assert not killed.exists()
    again = subprocess.run(_command(model, killed), capture_output=True, text=True)
    assert again.returncode == 2 and "--resume" in again.stderr and "Traceback" not in again.stderr
    resumed = subprocess.run(_command(model, killed, "--resume"), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    subprocess.run(_command(model, whole), check=True, capture_output=True)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (tmp_path / "killed.partial").exists()
