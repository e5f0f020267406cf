"""An exporter is one function and one row; help, errors and documentation read the row."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import intraslice
from intraslice.checkpoint.pruned import PrunedCheckpoint, open_pruned
from intraslice.errors import CheckpointError, RecipeError
from intraslice.exporters.options import ExportOptions, ExportReport
from intraslice.exporters.registry import EXPORTERS, Exporter
from intraslice.exporters.verify import _SENTENCES, TOLERANCES, verify
from intraslice.files import write_text
from intraslice.progress import Progress
from support.tiny import tiny_tokenizer
from support.tiny_models import pruned_model

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    pruned_model("llama-mha", torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def export_toy(checkpoint: PrunedCheckpoint, output: Path, options: ExportOptions, progress: Progress) -> ExportReport:
    """Write the FFN widths of the layers."""
    with progress.step("export to toy", 1) as advance:
        write_text(output, " ".join(str(shape.intermediate_size) for shape in checkpoint.shapes))
        advance(1)
    return ExportReport(to="toy", output=str(output))


@pytest.fixture
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Exporter(function=f"{__name__}:export_toy", summary="widths", options=("overwrite",), verified="nothing")
    monkeypatch.setitem(EXPORTERS, "toy", row)


@pytest.mark.usefixtures("_toy")
def test_one_function_and_one_row(pruned: Path, tmp_path: Path) -> None:
    report = intraslice.export(pruned, to="toy", output=tmp_path / "widths.txt")
    shapes = intraslice.load(pruned).config.layer_shapes
    assert (report.to, report.output) == ("toy", str(tmp_path / "widths.txt"))
    assert (tmp_path / "widths.txt").read_text().split() == [str(shape.intermediate_size) for shape in shapes]
    with pytest.raises(RecipeError, match="unknown export 'toi'; exports are stock, .*, toy. Did you mean 'toy'"):
        intraslice.export(pruned, to="toi", output=tmp_path / "other")
    with pytest.raises(RecipeError, match="export 'toy' does not read dtype; the options it reads are overwrite"):
        intraslice.export(pruned, to="toy", output=tmp_path / "other", dtype="float16")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("to", "option", "value"),
    [("stock", "pad_to", "max"), ("gguf", "pad_to", "dense"), ("onnx", "tokenizer_from", "a.gguf")],
)
def test_options_without_effect_are_refused(to: str, option: str, value: str, tmp_path: Path) -> None:
    known = ", ".join(EXPORTERS[to].options)
    with pytest.raises(RecipeError, match=f"export '{to}' does not read {option}; the options it reads are {known}."):
        intraslice.export(tmp_path / "not read", to=to, output=tmp_path / "out", **{option: value})


@pytest.mark.parametrize("name", EXPORTERS)
def test_rows_say_what_is_there(name: str) -> None:
    row = EXPORTERS[name]
    module, _, function = row.function.partition(":")
    assert callable(getattr(import_module(module), function))
    assert set(row.options) <= {field.name for field in fields(ExportOptions)}
    assert row.extra is None or row.extra in (metadata("intraslice").get_all("Provides-Extra") or ())


def test_help_names_every_exporter() -> None:
    code = (
        "import sys; from intraslice.cli.app import main; main(['export', '--help']); assert 'torch' not in sys.modules"
    )
    run: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown = " ".join(run.stdout.replace("\u2502", " ").split())
    for name, row in EXPORTERS.items():
        assert name in shown and row.summary.split()[-1] in shown


def test_the_documentation_has_the_table() -> None:
    lines = ["| `--to` | writes | options | extra | verified with |", "| --- | --- | --- | --- | --- |"]
    for name, row in EXPORTERS.items():
        extra = f"`intraslice[{row.extra}]`" if row.extra else ""
        options = ", ".join(f"`{option}`" for option in row.options)
        lines.append(f"| `{name}` | {row.summary} | {options} | {extra} | {row.verified} |")
    assert "\n".join(lines) in (REPOSITORY / "docs" / "deployment.md").read_text()


@pytest.mark.parametrize(("runtime", "dtype"), TOLERANCES)
def test_each_tolerance_decides(pruned: Path, runtime: str, dtype: str) -> None:
    """Just inside passes, just outside and NaN fail, for every row of the table."""
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32).eval()
    checkpoint = open_pruned(str(pruned))
    row = TOLERANCES[runtime, dtype]

    def off_by(part: float):
        def run(tokens_1T: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                logits = model(tokens_1T).logits
            logits[0, 0, 0] += part * (row.absolute + row.relative * logits.abs().max())
            return logits

        return run

    assert row.reason and _SENTENCES[runtime]
    assert verify(checkpoint, off_by(0.9), runtime=runtime, dtype=dtype) > 0
    for part in (1.2, float("nan")):
        with pytest.raises(CheckpointError, match="other logits than the checkpoint") as caught:
            verify(checkpoint, off_by(part), runtime=runtime, dtype=dtype)
        assert "{" not in str(caught.value)
