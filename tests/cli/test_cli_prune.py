from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from intraslice import pruning
from intraslice.cli.app import main
from intraslice.engine.run import Job
from intraslice.results.result import PruneResult

MULTIPLES = {"attention.head_multiple": 2, "ffn.ffn_multiple": 1, "ffn.iter_pca": False}
SMALL = [
    *("--calibration", "builtin", "--num-samples", "4", "--seqlen", "32"),
    *(part for name, value in MULTIPLES.items() for part in ("--set", f"{name}={value}")),
]


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_prune_prints_tables_and_writes_a_folder(tiny_folder, tmp_path: Path, capfd):
    out = tmp_path / "pruned"
    assert main(["prune", str(tiny_folder("llama")), "-o", str(out), "--sparsity", "0.3", *SMALL]) == 0
    printed = capfd.readouterr().out
    result = PruneResult.load(out)
    for text in (
        f"{result.pruned_parameters:,}",
        "FFN err",
        "peak memory",
        f"{result.sparsity:.4f}",
        str(out),
    ):
        assert text in printed
    assert result.recipe["calibration"]["num_samples"] == 4
    assert result.command.startswith("intraslice prune ") and "--sparsity 0.3" in result.command
    assert not out.with_name("pruned.partial").exists()
    # The same numbers from the saved folder.
    assert main(["inspect", str(out), "--json"]) == 0
    info = json.loads(capfd.readouterr().out)
    assert info["layer_parameters"] == result.pruned_layer_parameters
    assert info["num_parameters"] == result.pruned_parameters
    assert info["layers"][0]["errors"] == result.layers[0].errors
    assert main(["eval", str(out), "--seqlen", "64", "--windows", "2"]) == 0


def test_json_is_the_result(tiny_folder, tmp_path: Path, capfd):
    out = tmp_path / "pruned"
    status = main(["prune", str(tiny_folder("opt")), "-o", str(out), "--sparsity", "0.2", "--json", *SMALL])
    assert status == 0
    assert PruneResult.from_dict(json.loads(capfd.readouterr().out)) == PruneResult.load(out)


def test_python_interface_of_three_lines(tiny_folder, tmp_path: Path):
    import intraslice

    out = tmp_path / "pruned"
    options = {"calibration.source": "builtin", "calibration.num_samples": 4, "calibration.seqlen": 32, **MULTIPLES}
    result = intraslice.prune(str(tiny_folder("llama")), output=out, sparsity=0.3, options=options)
    model = intraslice.load(out)
    assert sum(p.numel() for p in model.parameters()) == result.pruned_parameters
    assert result.command.startswith("intraslice.prune(model=")


def test_dry_run_writes_nothing(tiny_folder, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["prune", str(tiny_folder("llama")), "-o", "pruned", "--sparsity", "0.5", "--dry-run"]
    assert main(arguments) == 0
    printed = capfd.readouterr().out
    assert "peak memory" in printed and "num_samples: 128" in printed and "27,648" in printed
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["target_layer_parameters"] == 27_648 // 2
    assert plan["target_parameters"] == plan["dense"]["num_parameters"] - 27_648 // 2
    assert plan["gradient_chunks"] == 1
    assert tree(tmp_path) == []


def test_dry_run_says_how_often_the_gradient_pass_loads_the_layers(tiny_folder, tmp_path: Path, capfd):
    arguments = ["prune", str(tiny_folder("llama")), "-o", str(tmp_path / "out"), "--sparsity", "0.5", "--dry-run"]
    small = [*arguments, "--num-samples", "8", "--seqlen", "32", "--set", "run.batch_tokens=64"]
    assert main([*small, "--set", "run.boundary_bytes=1", "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["gradient_chunks"] == 4  # one batch of two sequences each
    enough = plan["one_chunk_bytes"]
    for size, words in ((1, f"8 times; with --set run.boundary_bytes={enough} twice"), (enough, "layers 2 times\n")):
        assert main([*small, "--set", f"run.boundary_bytes={size}"]) == 0
        assert words in capfd.readouterr().out
    assert main([*small, "--method", "flap"]) == 0
    assert "gradient pass" not in capfd.readouterr().out


WRONG = {
    "truncated": ["{broken}", "-o", "{out}", "--sparsity", "0.3"],
    "positions": ["{good}", "-o", "{out}", "--sparsity", "0.3", "--seqlen", "4096"],
    "--overwrite": ["{good}", "-o", "{existing}", "--sparsity", "0.3"],
    "empty.txt": ["{good}", "-o", "{out}", "--sparsity", "0.3", "--calibration", "{empty}", "--seqlen", "32"],
    "wikitext2": ["{good}", "-o", "{out}", "--sparsity", "0.3", "--calibration", "wikitxt2", "--seqlen", "32"],
    "no-such-model": ["no-such-model", "-o", "{out}", "--sparsity", "0.3"],
    "input model": ["{good}", "-o", "{good}", "--sparsity", "0.3", "--overwrite"],
    "no output": ["{good}", "--sparsity", "0.3"],
    # Refused after the calibration text was read.
    "at most 90%": ["{good}", "-o", "{out}", "--sparsity", "0.92", *SMALL],
}


@pytest.mark.parametrize("expected", WRONG)
def test_wrong_input_writes_nothing(expected, tiny_folder, make_folder, tmp_path: Path, capfd):
    broken = make_folder("qwen2")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "existing").mkdir()
    (tmp_path / "place").mkdir()
    places = {
        "good": tiny_folder("llama"),
        "broken": broken,
        "out": tmp_path / "place" / "pruned",
        "empty": tmp_path / "empty.txt",
        "existing": tmp_path / "existing",
    }
    before = tree(tmp_path)
    assert main(["prune", *(part.format(**places) for part in WRONG[expected])]) == 2
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and expected in lines[0], captured.err
    assert captured.out == ""
    assert tree(tmp_path) == before


def test_interrupted_says_how_to_resume(tiny_folder, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch):
    def interrupt(job: Job) -> None:
        if "late" in job.output.name:
            job.output.with_name(f"{job.output.name}.partial").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning, "prune_checkpoint", interrupt)
    for name, expected in (
        ("early", "nothing was written"),
        ("late", "late.partial: repeat the command with --resume"),
    ):
        out = str(tmp_path / name)
        assert main(["prune", str(tiny_folder("llama")), "-o", out, "--sparsity", "0.3", *SMALL]) == 130
        assert expected in capfd.readouterr().err


def test_full_disk_is_one_sentence(tiny_folder, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, os.strerror(28), "model.safetensors")

    monkeypatch.setattr(pruning, "prune_checkpoint", full)
    out = tmp_path / "pruned"
    assert main(["prune", str(tiny_folder("llama")), "-o", str(out), "--sparsity", "0.3", *SMALL]) == 2
    sentence = capfd.readouterr().err.splitlines()[-1]
    assert "'model.safetensors': no space left" in sentence and "free some space" in sentence
