"""A run that is killed outright goes on from its last finished layer, to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from intraslice.cli.app import main
from support.text import WORDS


def _command(model: Path, out: Path, text: Path, *more: str) -> list[str]:
    command = ["prune", str(model), "-o", str(out), "--sparsity", "0.3", "--calibration", str(text)]
    command += ["--num-samples", "64", "--seqlen", "64", "--set", "ffn.ffn_multiple=1"]
    return command + ["--set", "attention.head_multiple=2", *more]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_kill_and_resume(make_folder, tmp_path, capfd):
    model, killed, whole = make_folder("llama", num_hidden_layers=24), tmp_path / "killed", tmp_path / "whole"
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number}. {WORDS}" for number in range(100)))
    # What kills it needs a process of its own; with as many threads as this one, which does the rest.
    process = subprocess.Popen(
        [sys.executable, "-m", "intraslice", *_command(model, killed, text)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first_layer = tmp_path / "killed.partial" / "layers" / "00000.safetensors"
    deadline = time.monotonic() + 600
    while not first_layer.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    assert not killed.exists()
    assert main(_command(model, killed, text)) == 2
    assert "--resume" in capfd.readouterr().err
    assert main(_command(model, killed, text, "--resume")) == 0
    assert main(_command(model, whole, text)) == 0
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (tmp_path / "killed.partial").exists()
