"""What is computed on a device that is not the CPU: nothing meets a CPU tensor there, and the results are the same.

The device is a made-up one, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

SUPPORT = Path(__file__).parent
BEGIN = """
import sys
from pathlib import Path
import torch
from support.other_device import NAME, install
install()
torch.set_num_threads(1)
from support.prune import prune, weights_of
from support.tiny import make_tiny, tiny_tokenizer
root = Path(sys.argv[1])
"""
PRUNE = """
for number, (family, method, options) in enumerate([
    ("llama", "intraslice", {"effort": "high", "tune.sites": "all"}),
    ("llama", "slicegpt", {"sparsity": 0.2889}),
    ("llama", "svd-llm", {}),
    ("qwen2", "disp-llm", {}),
    ("phi3", "llm-surgeon", {}),
    ("opt", "flap", {}),
]):
    dense = make_tiny(family, root / f"dense{number}")
    found = {}
    for device in ("cpu", NAME):
        result = prune(dense, root / f"{device}{number}", method, run__device=device, **options)
        assert result.device == device
        found[device] = weights_of(root / f"{device}{number}")
    assert found["cpu"].keys() == found[NAME].keys()
    for name, tensor in found["cpu"].items():
        torch.testing.assert_close(found[NAME][name], tensor, atol=1e-3, rtol=0, msg=f"{method} {name}")
"""
HALF = """
from support.family_cases import family_model
for case, method in (("llama", "sobp"), ("gemma2", "intraslice"), ("opt", "transact"), ("olmo2", "intraslice")):
    dense = root / case
    family_model(case, torch.bfloat16).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    prune(dense, root / f"{case}-pruned", method, **{"tune.sites": "all"})
"""
USE = """
from intraslice import api
from intraslice.data.calibration import load_calibration
from intraslice.healing.options import HealOptions
from intraslice.healing.run import heal_checkpoint
from support.text import WORDS
dense, pruned, text = root / "dense", root / "pruned", root / "text.txt"
text.write_text("".join(f"{number}. {WORDS}" for number in range(100)))
prune(make_tiny("llama", dense), pruned, sparsity=0.4)
by_device = [
    (
        load_calibration("self", tiny_tokenizer(), num_samples=4, seqlen=24, seed=0, vocab_size=272,
            model_folder=dense, device=device).tokens,
        api.evaluate_texts(pruned, [str(text)], seqlen=32, windows=4, against=dense, device=device).texts[0],
    )
    for device in ("cpu", NAME)
]
assert torch.equal(by_device[0][0], by_device[1][0])
scores = [score for _, score in by_device]
assert abs(scores[0].perplexity.mean_nll - scores[1].perplexity.mean_nll) < 1e-4
api.analyze(dense, text=str(text), num_samples=2, seqlen=24)
small = {"budget": "1536", "seqlen": 32, "batch_size": 4, "held_out": 4, "evaluate_every": 4, "lr": 1e-3}
for weights in ("full", "lora"):
    options = HealOptions(**small, calibration=str(text), weights=weights, precision="float32")
    record = heal_checkpoint(str(pruned), root / weights, options).record
    assert record.device == NAME and record.best.kl < 0.9 * record.kl_before
"""


# Metal has none, and no machine with it was at hand.
WITHOUT_FLOAT64 = """
text = root / "text.txt"
text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
from intraslice import api
for number, (family, method, options) in enumerate([
    ("llama", "intraslice", {"effort": "high", "tune.sites": "all"}),
    ("llama", "slicegpt", {"sparsity": 0.2889}),
    ("llama", "svd-llm", {}),
    ("opt", "flap", {}),
]):
    dense = make_tiny(family, root / f"dense{number}")
    prune(dense, root / f"pruned{number}", method, run__device=NAME, **options)
api.evaluate_texts(root / "pruned0", [str(text)], seqlen=32, windows=2, against=root / "dense0", device=NAME)
api.analyze(root / "dense0", text=str(text), num_samples=2, seqlen=24)
"""


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch takes no devices that are written in Python",
)
@pytest.mark.parametrize("code", [PRUNE, HALF, USE, WITHOUT_FLOAT64], ids=["prune", "half", "use", "no float64"])
def test_another_device(code: str, tmp_path: Path):
    if code is USE:
        pytest.importorskip("accelerate")
        pytest.importorskip("peft")
    begin = BEGIN.replace("install()", "install(float64=False)") if code is WITHOUT_FLOAT64 else BEGIN
    result = subprocess.run(
        [sys.executable, "-c", begin + code, str(tmp_path)],
        # The Trainer does not ask torch which accelerator there is.
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_TORCH_DEVICE": "other:0",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
