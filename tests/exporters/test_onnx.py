"""The ONNX graphs compute what transformers computes, at every batch and length, and appear only when whole."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from intraslice.checkpoint.pruned import open_pruned
from intraslice.errors import CheckpointError, MissingExtraError, OutputError, UnsupportedModelError
from intraslice.exporters import onnx as exporter
from intraslice.exporters import verify as verification
from intraslice.exporters.options import ExportOptions, ExportReport
from intraslice.progress import SilentProgress
from intraslice.runtime.configuration_intraslice import CACHE_ARGUMENT
from intraslice.runtime.families_intraslice import LayerShape
from support.pruned import prune_family, save_pruned
from support.tiny import VOCAB_SIZE

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

# Ragged groups with r > p, then equal groups with r < p and an odd p.
SHAPES = {
    "grouped": [
        LayerShape(heads_per_kv=(2, 1), qk_head_dim=6, v_head_dim=5, intermediate_size=40),
        LayerShape(heads_per_kv=(2,), qk_head_dim=4, v_head_dim=7, intermediate_size=9),
    ],
    "one-to-one": [
        LayerShape(heads_per_kv=(1, 1, 1), qk_head_dim=6, v_head_dim=5, intermediate_size=40),
        LayerShape(heads_per_kv=(1,), qk_head_dim=3, v_head_dim=7, intermediate_size=9),
    ],
}
WINDOW = 6


def shapes_of(family: str) -> list[LayerShape]:
    return SHAPES["one-to-one" if family == "opt" else "grouped"]


def export(source: Path, output: Path, **options: Any) -> ExportReport:
    return exporter.export_onnx(open_pruned(str(source)), output, ExportOptions(**options), SilentProgress())


class Exported:
    """A pruned model and its two graphs."""

    def __init__(
        self,
        root: Path,
        family: str,
        export_options: dict[str, Any] | None = None,
        shapes: list[LayerShape] | None = None,
        source: Path | None = None,
        **overrides: Any,
    ) -> None:
        self.source = source or save_pruned(root / "pruned", family, shapes or shapes_of(family), **overrides)
        self.folder = root / "onnx"
        self.report = export(self.source, self.folder, **(export_options or {}))
        self.model = AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32).eval()
        self.prefill = onnxruntime.InferenceSession(self.folder / "prefill.onnx")
        self.decode = onnxruntime.InferenceSession(self.folder / "decode.onnx")

    def run_prefill(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        logits, *cache = self.prefill.run(None, {"input_ids": ids.numpy()})
        return torch.from_numpy(logits), cache

    def run_decode(self, ids: torch.Tensor, cache: list[Any]) -> tuple[torch.Tensor, list[Any]]:
        names = [node.name for node in self.decode.get_inputs()]
        logits, *cache = self.decode.run(None, dict(zip(names, [ids.numpy(), *cache], strict=True)))
        return torch.from_numpy(logits), cache

    @torch.no_grad()
    def check(self, batch: int, length: int, steps: int = 5, atol: float = 1e-4) -> None:
        ids = torch.randint(VOCAB_SIZE, (batch, length + steps), generator=torch.Generator().manual_seed(1))
        past = None
        cache: list[Any] = []
        for start, stop in [(0, length), *((at, at + 1) for at in range(length, length + steps))]:
            expected = self.model(ids[:, start:stop], **{CACHE_ARGUMENT: past}, use_cache=True)
            past = expected[CACHE_ARGUMENT]
            run = (self.run_decode, ids[:, start:stop], cache) if start else (self.run_prefill, ids[:, :stop])
            logits, cache = run[0](*run[1:])
            torch.testing.assert_close(logits.float(), expected.logits, atol=atol, rtol=0)


@pytest.fixture(scope="session")
def windowed(tmp_path_factory) -> Exported:
    return Exported(tmp_path_factory.mktemp("mistral"), "mistral", sliding_window=WINDOW)


@pytest.fixture(scope="session")
def opt(tmp_path_factory) -> Exported:
    return Exported(tmp_path_factory.mktemp("opt"), "opt")


@pytest.fixture
def traced(windowed, monkeypatch) -> None:
    """Tracing takes seconds; tests about files take the graphs that are there already."""
    import onnx_ir

    def load(model: Any, checkpoint: Any, decode: bool) -> Any:
        return onnx_ir.load(windowed.folder / ("decode.onnx" if decode else "prefill.onnx"))

    monkeypatch.setattr(exporter, "_trace", load)


# One token, the sizes of the export, and a text longer than the window.
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 3), (3, 4), (1, 2 * WINDOW + 5)])
def test_logits_equal_those_of_transformers(windowed, batch, length):
    windowed.check(batch, length)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 11)])
def test_without_rope(opt, batch, length):
    opt.check(batch, length)


ONE_OF_EACH_KIND = (
    "llama",
    "qwen2",
    "phi3",
    "qwen3",
    "gemma3_text",
    "olmo2",
    "glm4",
    "cohere2",
    "ministral3",
    "gpt_neox",
    "gpt2",
)
"""Tracing takes seconds; these have between them everything that layers of the table can have."""


@pytest.mark.slow
@pytest.mark.parametrize("family", ONE_OF_EACH_KIND)
def test_other_families(family, tmp_path):
    prune_family(family, tmp_path)
    found = Exported(tmp_path, family, source=tmp_path / "pruned")
    # Logits are of size 1 to 30.
    found.check(1, 1, atol=1e-3)
    found.check(3, 11, atol=1e-3)


def test_layers_without_attention_or_ffn(tmp_path):
    first, second = SHAPES["grouped"]
    shapes = [first.without("attention"), second, first.without("ffn"), second.without("attention").without("ffn")]
    exported = Exported(tmp_path, "mistral", shapes=shapes, sliding_window=WINDOW)
    exported.check(1, 1)
    exported.check(2, 2 * WINDOW + 1)
    # What has no attention has no place in the cache.
    cache = [f"{layer}.{part}" for layer in (1, 2) for part in ("key", "value")]
    assert [node.name for node in exported.prefill.get_outputs()] == ["logits", *(f"present.{name}" for name in cache)]
    assert [node.name for node in exported.decode.get_inputs()] == ["input_ids", *(f"past.{name}" for name in cache)]


@pytest.mark.slow
def test_half_precision(tmp_path):
    found = Exported(tmp_path, "llama", {"dtype": "float16"})
    assert {node.type for node in found.decode.get_inputs()[1:]} == {"tensor(float16)"}
    # Eleven bits of mantissa, logits up to about 5.
    found.check(2, 9, atol=0.1)


def test_report(windowed):
    report = windowed.report
    assert (report.to, report.output) == ("onnx", str(windowed.folder))
    assert report.max_logit_difference < 1e-4 and report.seconds > 0
    assert any("share the weights" in note for note in report.notes)
    assert any("sliding window" in note for note in report.notes)


def test_names_and_shapes_of_the_cache(windowed):
    inputs = {node.name: node.shape for node in windowed.decode.get_inputs()}
    assert list(inputs) == ["input_ids", *(f"past.{i}.{part}" for i in range(2) for part in ("key", "value"))]
    assert inputs["past.0.key"][1::2] == [2, 6] and inputs["past.0.value"][1::2] == [2, 5]
    assert inputs["past.1.key"][1::2] == [1, 4] and inputs["past.1.value"][1::2] == [1, 7]
    for session in (windowed.prefill, windowed.decode):
        names = [node.name for node in session.get_outputs()]
        assert names == ["logits", *(f"present.{i}.{part}" for i in range(2) for part in ("key", "value"))]
    assert all(isinstance(size, str) for size in (inputs["past.0.key"][0], inputs["past.0.key"][2]))


def test_weights_are_stored_once(windowed):
    assert {path.suffix for path in windowed.folder.glob("*.onnx*")} == {".onnx", ".data"}
    weights = sum(parameter.nbytes for parameter in windowed.model.parameters())
    # The constants of this small model are folded with transposed weights, which differ in their bytes.
    assert windowed.folder.joinpath("weights.onnx.data").stat().st_size < 1.5 * weights
    for name in ("prefill.onnx", "decode.onnx"):
        content = (windowed.folder / name).read_bytes()
        assert b"site-packages" not in content and b"modeling_intraslice" not in content, "paths of this machine"


def test_config_and_tokenizer_come_along(windowed):
    config = AutoConfig.from_pretrained(windowed.folder)
    assert config.layer_shapes == tuple(SHAPES["grouped"])
    assert json.loads((windowed.folder / "config.json").read_text())["dtype"] == "float32"
    assert (windowed.folder / "generation_config.json").is_file()
    ids = AutoTokenizer.from_pretrained(windowed.folder)("a text", return_tensors="pt").input_ids
    logits, cache = windowed.run_prefill(ids)
    found = [logits[:, -1].argmax(-1)]
    for _ in range(5):
        logits, cache = windowed.run_decode(found[-1][:, None], cache)
        found.append(logits[:, -1].argmax(-1))
    expected = windowed.model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.cat(found).tolist() == expected[0, ids.shape[1] :].tolist()


def test_existing_output(windowed, traced, tmp_path):
    output = tmp_path / "onnx"
    export(windowed.source, output)
    before = (output / "decode.onnx").stat().st_mtime_ns
    with pytest.raises(OutputError, match="already exists"):
        export(windowed.source, output)
    assert (output / "decode.onnx").stat().st_mtime_ns == before
    report = export(windowed.source, output, overwrite=True)
    assert (output / "decode.onnx").stat().st_mtime_ns != before
    assert report.max_logit_difference < 1e-4
    with pytest.raises(OutputError, match="folder of the model itself"):
        export(windowed.source, windowed.source, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def hide(monkeypatch, package: str) -> None:
    real = importlib.import_module

    def import_module(name: str, *rest: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {package!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", import_module)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_package(package, windowed, tmp_path, monkeypatch):
    hide(monkeypatch, package)
    with pytest.raises(MissingExtraError, match=rf"package {package} .*pip install 'intraslice\[onnx\]'"):
        export(windowed.source, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_missing_runtime_is_said(windowed, traced, tmp_path, monkeypatch):
    hide(monkeypatch, "onnxruntime")
    report = export(windowed.source, tmp_path / "onnx")
    assert report.max_logit_difference is None
    assert any("not verified" in note and "intraslice[onnx]" in note for note in report.notes)
    assert not any("not verified" in note for note in export(windowed.source, tmp_path / "b", verify=False).notes)


def test_wrong_logits_publish_nothing(windowed, traced, tmp_path, monkeypatch):
    right = verification.reference_logits
    for wrong in (1e-2, float("nan")):
        monkeypatch.setattr(verification, "reference_logits", lambda *given, wrong=wrong: right(*given) + wrong)
        with pytest.raises(CheckpointError, match="other logits than the checkpoint"):
            export(windowed.source, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_failing_exporter_is_one_sentence_and_leaves_nothing(windowed, tmp_path, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.onnx.OnnxExporterError("no such operator\nand a long story")

    monkeypatch.setattr(torch.onnx, "export", fail)
    output = tmp_path / "sub" / "onnx"
    with pytest.raises(UnsupportedModelError, match="cannot write .* as an ONNX graph") as caught:
        export(windowed.source, output)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "sub").iterdir())


def test_the_exporter_is_silent(windowed, traced, tmp_path, capfd, recwarn):
    export(windowed.source, tmp_path / "onnx")
    assert capfd.readouterr() == ("", "") and not list(recwarn)


def test_bfloat16_is_refused(windowed, tmp_path):
    with pytest.raises(UnsupportedModelError, match="bfloat16 .* choose float32 or float16"):
        export(windowed.source, tmp_path / "onnx", dtype="bfloat16")


def test_rope_that_depends_on_the_length_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
    source = save_pruned(tmp_path / "pruned", "llama", shapes_of("llama"), rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match="RoPE of type 'dynamic'"):
        export(source, tmp_path / "onnx")
