"""The scripts and the notebook of examples/, on tiny models."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient import NotebookClient

import intraslice
from intraslice.api import PruneResult
from intraslice.progress import SilentProgress

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOK = EXAMPLES / "prune_and_look.ipynb"
CALIBRATION = ["--calibration", "builtin", "--num-samples", "4", "--seqlen", "64"]


@pytest.fixture
def model(tiny_folder: Callable[..., Path]) -> str:
    """Return a tiny model wide enough that 30 % is within reach of the rounded widths."""
    return str(tiny_folder("llama", intermediate_size=512))


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_listed_and_short() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]:
        assert f"`{path.name}`" in listed
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 40


def test_prune_and_evaluate(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pruned"
    load_script("prune_and_evaluate").main(["--model", model, "-o", str(out), *CALIBRATION])
    result = PruneResult.load(out)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{result.dense_parameters:,} parameters -> {result.pruned_parameters:,}"
    assert [line.split(":")[0] for line in lines[1:]] == [model, str(out)]


def test_compare_methods(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_script("compare_methods").main(
        ["--model", model, "-o", str(tmp_path), "--methods", "naive", "flap", *CALIBRATION]
    )
    assert [PruneResult.load(tmp_path / name).method for name in ("naive", "flap")] == ["naive", "flap"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["method", "naive", "flap"]


def test_export_llamacpp(tiny_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Heads wide enough to be cut to a multiple of 16, and enough channels that multiples of 32 meet 30 %.
    model = str(tiny_folder("llama", head_dim=32, intermediate_size=1280))
    load_script("export_llamacpp").main(["--model", model, "-o", str(tmp_path), *CALIBRATION])
    assert (tmp_path / "model.gguf").read_bytes().startswith(b"GGUF")
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'model.gguf'} is written")


class _StopAfterOneLayer(SilentProgress):
    """Interrupts the run, like Ctrl-C, when it has finished one layer and goes on to report the second."""

    @contextmanager
    def step(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        finished = 0

        def advance(units: int) -> None:
            nonlocal finished
            finished += units
            if description == "layers" and finished > 1:
                raise KeyboardInterrupt

        yield advance


def test_resume_run(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main = load_script("resume_run").main
    main(["--model", model, "-o", str(tmp_path / "whole"), *CALIBRATION])
    with monkeypatch.context() as patch:
        patch.setattr(intraslice, "prune", partial(intraslice.prune, progress=_StopAfterOneLayer()))
        with pytest.raises(SystemExit, match="goes on from here"):
            main(["--model", model, "-o", str(tmp_path / "stopped"), *CALIBRATION])
    assert not (tmp_path / "stopped").exists()
    main(["--model", model, "-o", str(tmp_path / "stopped"), *CALIBRATION])
    first, second = capsys.readouterr().out.splitlines()
    assert first.split(": ")[1] == second.split(": ")[1]
    whole, stopped = (tmp_path / name / "model.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()


def test_analyze_spectra(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    load_script("analyze_spectra").main(["--model", model, "--json", str(out), *CALIBRATION])
    ranks = json.loads(out.read_text())["effective_rank"]["residual"]
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [float(row.split()[-1]) for row in rows] == pytest.approx(ranks, abs=0.05)


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, f"clear the outputs of cell {cell.id!r}"


@pytest.mark.slow
def test_the_notebook_runs(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTRASLICE_EXAMPLE_MODEL", model)
    monkeypatch.setenv("INTRASLICE_EXAMPLE_OUTPUT", str(tmp_path / "pruned"))
    monkeypatch.setenv("INTRASLICE_EXAMPLE_SAMPLES", "4")
    monkeypatch.setenv("INTRASLICE_EXAMPLE_SEQLEN", "64")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 5
    assert PruneResult.load(tmp_path / "pruned").requested_sparsity == 0.3
