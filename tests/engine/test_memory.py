"""The memory that a dry run announces, against what the run takes in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from intraslice.pruning import dry_run
from intraslice.recipes.recipe import load_recipe
from support.tiny import make_tiny

# Wide enough that the model, its statistics and its states outweigh what any process takes for torch.
WIDE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
}
CODE = """
import json, sys
import transformers.models.llama.modeling_llama
from intraslice.placement import peak_resident_bytes
from intraslice.pruning import dry_run, prune_recipe
from intraslice.recipes.recipe import load_recipe
flags = {"model": sys.argv[1], "output": sys.argv[2], "sparsity": 0.3, "method": sys.argv[3]}
text = {"calibration.source": "builtin", "calibration.num_samples": 96, "calibration.seqlen": 256}
recipe = load_recipe(None, {**flags, "run.device": "cpu", **text})
before = peak_resident_bytes()
estimated = dry_run(recipe).estimated_peak_bytes
prune_recipe(recipe)
print(json.dumps({"before": before, "estimated": estimated, "measured": peak_resident_bytes()}))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("wide"), **WIDE)


@pytest.mark.parametrize("method", ["intraslice", "svd-llm"])
def test_the_estimate_of_a_dry_run_is_within_a_factor_of_two(method, wide, tmp_path):
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(wide), str(tmp_path / "out"), method],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert 0.5 < found["estimated"] / found["measured"] < 2.0, found
    # Without what the process had before it knew the model, which would make any estimate look good.
    run, announced = (found[name] - found["before"] for name in ("measured", "estimated"))
    assert run > 150e6 and 0.5 < announced / run < 2.0, found


@pytest.mark.parametrize(
    ("method", "held"),
    [
        # Two moments a layer, of the width of the residual stream; all layers.
        ("llm-surgeon", 2 * 3 * 256 * 256),
        ("disp-llm", 3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)),
        ("tyr", 0),
    ],
)
def test_what_a_method_holds_of_all_layers_is_announced(method, held, wide, monkeypatch):
    monkeypatch.setattr("intraslice.inspection.peak_resident_bytes", lambda: 0)

    def estimated(method: str) -> int:
        flags = {"model": str(wide), "sparsity": 0.3, "method": method, "calibration.source": "builtin"}
        return dry_run(load_recipe(None, flags)).estimated_peak_bytes

    assert estimated(method) - estimated("intraslice") == 4 * held
