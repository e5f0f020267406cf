"""What is wrong in the YAML file is said in one sentence before anything is run or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intraslice.cli.app import main

CAPPED = {"label": "a", "method": "naive"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"methods": ["intraslce"]}, "'intraslice'"),
        ({"method": ["naive"]}, "'methods'"),
        ({"methods": [{"label": "x", "metod": "naive"}]}, "'method'"),
        ({"methods": [CAPPED, CAPPED]}, "two methods are called 'a'"),
        ({"methods": ["naive", {**CAPPED, "options": {"ffn.iterpca": True}}]}, "'ffn.iter_pca'"),
        ({"methods": [{**CAPPED, "options": {"calibration.seed": 1}}]}, "share their calibration"),
        ({"options": {"sparsity": 0.3}}, "field of the comparison"),
        ({"sparsities": [0.2, 1.2]}, "[0, 0.95)"),
        ({"calibration": {"num_sample": 4}}, "'num_samples'"),
        ({"calibration": {"source": "wikitxt2"}}, "'wikitext2'"),
        ({"calibration": {"source": "none.txt"}}, "none.txt"),
        ({"evaluation": {"windows": 0}}, "evaluation.windows"),
        ({"evaluation": {"seqlen": 4096}}, "128 positions"),
        ({"speed": {"promt_tokens": 8}}, "'prompt_tokens'"),
        ({"speed": {"repetitions": 0}}, "repetitions must be at least 1"),
        ({"sweeps": [{"option": "ffn.dampin", "values": [1], "sparsity": 0.2}]}, "'ffn.damping'"),
        ({"sweeps": [{"option": "ffn.damping", "values": [1], "sparsity": 0.2, "method": "nave"}]}, "'naive'"),
        ({"models": ["./no-such-model"]}, "no-such-model"),
        ({"models": []}, "models"),
        ({"heal": "20min"}, "'20min' is a time"),
        ({"heal": "much"}, "neither tokens nor a time"),
        ({"heal": 10}, "smaller than one step"),
        ({"heal": {"weights": "lora"}}, "'heal.budget' is missing"),
        ({"heal": {"budget": "1k", "wieghts": "lora"}}, "'weights'"),
        ({"heal": {"budget": "1k", "seed": 1}}, "text and the device of its prune"),
        ({"heal": {"budget": "1k", "seqlen": "long"}}, "heal.seqlen"),
        ({"heal": "1M", "methods": ["naive", {"label": "naive, healed", "method": "flap"}]}, "choose another label"),
    ],
)
def test_wrong_files(small: Callable[..., Path], jobs: list, tmp_path: Path, capfd, changes: dict[str, Any], expected):
    file = small(**changes)
    # Saving the tiny model shows a bar.
    capfd.readouterr()
    assert main(["compare", str(file), "-o", str(tmp_path / "out")]) == 2
    captured = capfd.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.strip()]
    assert line.startswith("error: ") and expected in line and captured.out == ""
    assert not (tmp_path / "out").exists()
    assert not [job for job in jobs if job["job"] == "prune"]


def test_files_that_cannot_be_read(tmp_path: Path, capfd):
    out = str(tmp_path / "out")
    (tmp_path / "list.yaml").write_text("- models\n")
    (tmp_path / "torn.yaml").write_text("models: [\n")
    cases = {"none.yaml": "cannot be read", "list.yaml": "models, methods, sparsities", "torn.yaml": "is not YAML"}
    for name, expected in cases.items():
        assert main(["compare", str(tmp_path / name), "-o", out]) == 2
        assert expected in capfd.readouterr().err
