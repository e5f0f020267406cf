"""Stock and padded exports compute the same as the checkpoint, in the stock class and without code of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import intraslice
from intraslice.checkpoint.pruned import open_pruned
from intraslice.errors import CheckpointError, OutputError, RecipeError, UnsupportedModelError
from intraslice.exporters.export import export_checkpoint
from intraslice.exporters.options import ExportOptions
from intraslice.progress import SilentProgress
from intraslice.runtime.configuration_intraslice import dense_shape, pruned_config
from intraslice.runtime.families_intraslice import FAMILIES
from support.pruned import save, save_uniform
from support.tiny_models import CASES, LLAMA3_ROPE, dense_config_of, pruned_model, randomise, tokens


def _logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens()).logits


def _export(source: Path, to: str, output: Path, **options):
    return export_checkpoint(str(source), to, output, ExportOptions(**options), SilentProgress())


SUBSETS = [(case, width) for case in ("llama-mha", "llama-llama3-rope", "mistral-mha", "qwen2-gqa") for width in (6, 4)]
WHOLE = [(case, 8) for case in ("llama-mha", "llama-llama3-rope", "mistral-mha", "qwen2-gqa", "phi3-mha")]


@pytest.mark.parametrize(("case", "width"), SUBSETS + WHOLE)
def test_a_stock_export_is_the_same_model(tmp_path: Path, case: str, width: int):
    source = save_uniform(case, tmp_path / "pruned", width=width)
    report = _export(source, "stock", tmp_path / "stock")
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-4
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["model_type"] in FAMILIES
    assert not {"auto_map", "intraslice", "per_layer_config"} & set(config)
    # Older readers know only these, and would silently take the default angles.
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert (config["rope_scaling"] is None) == (config["rope_parameters"].get("rope_type", "default") == "default")
    assert not list((tmp_path / "stock").glob("*.py"))
    torch.testing.assert_close(_logits(tmp_path / "stock"), _logits(source), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("case", "width"), [("llama-mha", 6), ("llama-mha", 8), ("llama-gqa-biases", 8)])
def test_output_biases_become_those_of_the_stock_class(tmp_path: Path, case: str, width: int):
    source = save_uniform(case, tmp_path / "pruned", width=width, biases=True)
    _export(source, "stock", tmp_path / "stock")
    config = AutoConfig.from_pretrained(tmp_path / "stock")
    assert (config.model_type, config.attention_bias, config.mlp_bias) == ("llama", True, True)
    torch.testing.assert_close(_logits(tmp_path / "stock"), _logits(source), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("to", "case"), [("stock", "mistral-mha"), ("padded", "qwen2-gqa"), ("padded", "phi3-mha")])
def test_output_biases_that_a_class_has_no_place_for_are_refused(tmp_path: Path, to: str, case: str):
    source = save_uniform(case, tmp_path / "pruned", width=8, biases=True)
    with pytest.raises(UnsupportedModelError, match="biases on o_proj and down_proj.*no place") as caught:
        _export(source, to, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["llama-mha", "opt", "opt-no-bias"])
def test_padding_keeps_output_biases_of_single_layers(tmp_path: Path, case: str):
    dense = dense_config_of(case)
    spec = FAMILIES[dense.model_type]
    full = dense_shape(dense, spec)
    small = replace(full, heads_per_kv=(1,), intermediate_size=40, output_bias=True)
    shapes = [small, full, replace(full, intermediate_size=9)]
    model = AutoModelForCausalLM.from_config(pruned_config(dense, spec, shapes, method="random", recipe={}))
    randomise(model.float().eval())
    source = save(model, tmp_path / "pruned")
    _export(source, "padded", tmp_path / "padded")
    torch.testing.assert_close(_logits(tmp_path / "padded"), _logits(source), atol=1e-4, rtol=1e-4)


def test_odd_head_counts_become_a_mistral(tmp_path: Path):
    source = save_uniform("llama-mha", tmp_path / "pruned", width=6, heads=3, kv=3)
    _export(source, "stock", tmp_path / "stock")
    assert AutoConfig.from_pretrained(tmp_path / "stock").model_type == "mistral"
    torch.testing.assert_close(_logits(tmp_path / "stock"), _logits(source), atol=1e-4, rtol=1e-4)


def test_odd_head_counts_with_biases_have_no_stock_class(tmp_path: Path):
    source = save_uniform("llama-gqa-biases", tmp_path / "pruned", width=6, heads=3, kv=1)
    with pytest.raises(UnsupportedModelError, match="3 heads.*do not divide hidden_size 32"):
        _export(source, "stock", tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_phi3_takes_no_subset_of_pairs(tmp_path: Path):
    source = save_uniform("phi3-mha", tmp_path / "pruned", width=6)
    with pytest.raises(UnsupportedModelError, match="Phi3Config refuses heads of 6 channels.*--to padded"):
        _export(source, "stock", tmp_path / "stock")


def test_it_loads_where_this_package_is_not_installed(tmp_path: Path):
    source = save_uniform("llama-mha", tmp_path / "pruned", width=6)
    _export(source, "stock", tmp_path / "stock")
    code = (
        "import sys; sys.modules['intraslice'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'stock')!r}).eval()\n"
        "print(type(model).__name__, model(torch.arange(5)[None]).logits.abs().sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, total = done.stdout.split()
    assert name == "LlamaForCausalLM"
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    assert float(total) == pytest.approx(model(torch.arange(5)[None]).logits.abs().sum().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("case", "reason"),
    [("llama-mha", "3 different shapes"), ("opt", "3 different shapes")],
)
def test_shapes_that_differ_are_refused_with_numbers(tmp_path: Path, case: str, reason: str):
    source = save(pruned_model(case, torch.float32), tmp_path / "pruned")
    with pytest.raises(UnsupportedModelError, match=f"{reason}.*--target stock.*% decoder weights"):
        _export(source, "stock", tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_pairs_that_differ_are_refused(tmp_path: Path):
    source = save_uniform("llama-mha", tmp_path / "pruned", width=6, kv=2)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers[1].self_attn.set_rope_pairs(torch.tensor([[0, 1, 2], [1, 2, 3]]))
    model.save_pretrained(source)
    with pytest.raises(UnsupportedModelError, match="different rotary pairs"):
        _export(source, "stock", tmp_path / "stock")


def test_frequencies_that_change_with_the_length_are_refused(tmp_path: Path):
    source = save_uniform("llama-dynamic-rope", tmp_path / "pruned", width=6, kv=2)
    with pytest.raises(UnsupportedModelError, match="'dynamic' change with the length"):
        _export(source, "stock", tmp_path / "stock")
    # All pairs in their dense places need no constants.
    report = _export(source, "padded", tmp_path / "padded")
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-4


@pytest.mark.parametrize("pad_to", ["dense", "max"])
@pytest.mark.parametrize("case", list(CASES))
def test_padding_is_exact(tmp_path: Path, case: str, pad_to: str):
    source = save(pruned_model(case, torch.float32), tmp_path / "pruned")
    report = _export(source, "padded", tmp_path / "padded", pad_to=pad_to)
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-4
    assert "weights" in report.notes[0]
    config = AutoConfig.from_pretrained(tmp_path / "padded")
    assert config.model_type == CASES[case][0].model_type
    if pad_to == "dense":
        assert dense_shape(config, FAMILIES[config.model_type]) == open_pruned(str(source)).dense_shape
    torch.testing.assert_close(_logits(tmp_path / "padded"), _logits(source), atol=1e-4, rtol=1e-4)


def test_padding_to_the_maximum_keeps_a_part_of_the_gain(tmp_path: Path):
    source = save_uniform("llama-llama3-rope", tmp_path / "pruned", width=6, rope_parameters=LLAMA3_ROPE)
    report = _export(source, "padded", tmp_path / "padded", pad_to="max")
    assert "+0.0%" in report.notes[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path: Path, dtype: str):
    source = save_uniform("llama-mha", tmp_path / "pruned", width=6)
    report = _export(source, "stock", tmp_path / "stock", dtype=dtype)
    assert report.max_logit_difference is not None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype="auto").dtype == getattr(torch, dtype)


def test_what_is_not_ours_is_refused(tiny_folder, tmp_path: Path):
    with pytest.raises(CheckpointError, match="was not pruned by intraslice"):
        _export(tiny_folder("llama"), "stock", tmp_path / "out")
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        _export(tmp_path / "nothing", "stock", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_output_stays(tmp_path: Path):
    source = save_uniform("llama-mha", tmp_path / "pruned", width=6)
    _export(source, "stock", tmp_path / "out")
    with pytest.raises(OutputError, match="already exists"):
        _export(source, "stock", tmp_path / "out")
    _export(source, "stock", tmp_path / "out", overwrite=True)
    with pytest.raises(OutputError, match="would replace the checkpoint"):
        _export(source, "stock", source, overwrite=True)


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path, monkeypatch):
    source = save_uniform("llama-mha", tmp_path / "pruned", width=6)
    monkeypatch.setattr("intraslice.exporters.stock.scale_queries", lambda layer, factor: layer)
    with pytest.raises(CheckpointError, match="other logits than the checkpoint"):
        _export(source, "stock", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]


def test_names_that_do_not_exist():
    with pytest.raises(RecipeError, match="unknown export 'stok'.*Did you mean 'stock'"):
        export_checkpoint("x", "stok", Path("y"))
    with pytest.raises(RecipeError, match="dtype must be one of"):
        ExportOptions(dtype="int3")


def test_a_pruned_model_becomes_stock_through_the_interface(tiny_folder, tmp_path: Path):
    options = {
        "calibration.source": "builtin",
        "calibration.num_samples": 4,
        "calibration.seqlen": 32,
        "ffn.ffn_multiple": 1,
    }
    intraslice.prune(
        str(tiny_folder("qwen2")), output=tmp_path / "pruned", sparsity=0.3, target="stock", options=options
    )
    report = intraslice.export(tmp_path / "pruned", to="stock", output=tmp_path / "stock")
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-4
    assert AutoConfig.from_pretrained(tmp_path / "stock").model_type == "qwen2"
