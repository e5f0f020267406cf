from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from intraslice.errors import RecipeError
from intraslice.methods.blockwise.options import BlockwiseOptions
from intraslice.methods.presets import DEFAULT_EFFORT
from intraslice.methods.registry import METHODS
from intraslice.methods.svd_llm.options import SvdLlmOptions
from intraslice.options import CalibrationOptions, RunOptions
from intraslice.recipes.recipe import Recipe, fit_to_model, load_recipe, parse_align, recipe_from_dict
from intraslice.recipes.words import option_names
from intraslice.runtime.families_intraslice import FAMILIES

BASE = {"model": "m", "sparsity": 0.3}


def fitted(recipe: Recipe, family: str, hidden_size: int, *, norms_first: bool = True) -> Recipe:
    return fit_to_model(recipe, FAMILIES[family], hidden_size=hidden_size, norms_first=norms_first)


def message(flags: dict | None = None, sets: tuple[str, ...] = (), path: Path | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, {**BASE, **(flags or {})}, sets)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_those_of_the_options():
    recipe = load_recipe(None, {**BASE, "effort": "low"})
    assert recipe.method == "intraslice"
    assert recipe.options == BlockwiseOptions()
    assert (recipe.calibration.source, recipe.calibration.num_samples, recipe.calibration.seqlen) == (
        "offline-mix",
        128,
        2048,
    )


@pytest.mark.parametrize(
    ("method", "heads", "pca", "iter_pca"),
    [
        ("intraslice", "adaptive", True, False),
        ("iter-pca", "adaptive", True, True),
        ("paper", "adaptive", True, True),
        ("ada-h", "adaptive", False, False),
        ("naive", "whole", False, False),
    ],
)
def test_presets_are_the_ablations(method: str, heads: str, pca: bool, iter_pca: bool):
    options = load_recipe(None, {**BASE, "method": method}).options
    assert options.attention.heads == heads
    assert options.allocation.pca_attention is pca
    assert options.allocation.pca_ffn is pca
    assert options.ffn.iter_pca is iter_pca


def test_presets_name_existing_options():
    for name in METHODS:
        load_recipe(None, {**BASE, "method": name})


def test_later_sources_win(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: from-file\nsparsity: 0.1\nmethod: naive\n"
        "attention: {heads: adaptive}\nffn: {iter_pca: true}\ncalibration: {seed: 1, num_samples: 2}\n"
    )
    alone = load_recipe(path)
    assert (alone.model, alone.sparsity, alone.options.attention.heads) == ("from-file", 0.1, "adaptive")
    # The preset still gives what the file leaves out.
    assert alone.options.allocation.pca_ffn is False
    flags = {"sparsity": "0.2", "calibration.seed": 5, "calibration.num_samples": None}
    merged = load_recipe(path, flags, ["calibration.seed=7", "ffn.iter_pca_lr=1e-4"])
    assert (merged.sparsity, merged.calibration.seed, merged.calibration.num_samples) == (0.2, 7, 2)
    assert merged.options.ffn.iter_pca_lr == 1e-4


def test_yaml_and_json_round_trip(tmp_path: Path):
    recipe = load_recipe(None, {**BASE, "method": "ada-h", "calibration.text_field": "body"})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    path.write_text(json.dumps(recipe.to_dict()))  # JSON is YAML
    assert load_recipe(path) == recipe


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_records_what_the_method_reads_and_nothing_else(method: str):
    recipe = load_recipe(None, {**BASE, "method": method})
    flat = yaml.safe_load(recipe.to_yaml())
    names = {
        f"{section}.{name}" if isinstance(value, dict) else section
        for section, value in flat.items()
        for name in (value if isinstance(value, dict) else [""])
    }
    of_method = set(option_names(METHODS[method]))
    general = set(option_names(None, old=False)) - {name for entry in METHODS.values() for name in option_names(entry)}
    assert names == general | (recipe.options.read() & of_method)


def test_set_names_every_option():
    names = {
        f"{section.name}.{inner.name}"
        for form in (BlockwiseOptions(), SvdLlmOptions())
        for section in fields(form)
        for inner in fields(getattr(form, section.name))
    }
    for own in (CalibrationOptions, RunOptions):
        section = own.__name__.removesuffix("Options").lower()
        names |= {f"{section}.{inner.name}" for inner in fields(own)}
    names |= {name for name in Recipe.model_fields if name not in ("options", "notes", "calibration", "run")}
    assert set(option_names(None, old=False)) == names


@pytest.mark.parametrize("value", [0.95, 1, -0.1, "nan", "inf", "a lot"])
def test_sparsity_out_of_range(value: object):
    assert "[0, 0.95)" in message({"sparsity": value})


@pytest.mark.parametrize("value", [0, 0.0, 0.9499, "0.5"])
def test_sparsity_in_range(value: float):
    assert load_recipe(None, {**BASE, "sparsity": value}).sparsity == float(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("allocation.ffn_share", 0),
        ("allocation.max_site_sparsity", 1),
        ("allocation.max_site_sparsity", 0),
        ("attention.min_head_fraction", 1.1),
        ("attention.head_multiple", 3),
        ("attention.damping", 0),
        ("ffn.damping", -1),
        ("ffn.ffn_multiple", 0),
        ("calibration.num_samples", 0),
        ("calibration.seqlen", 1),
        ("calibration.seed", -1),
        ("run.batch_tokens", 0),
    ],
)
def test_out_of_range_options_are_named(name: str, value: float):
    text = message(sets=(f"{name}={value}",))
    assert name in text and str(value) in text


def test_out_of_range_options_of_a_part_are_named():
    text = message(sets=("ffn.iter_pca=true", "ffn.iter_pca_rounds=0"))
    assert "ffn.iter_pca_rounds must be at least 1, got 0" in text


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ("ffn.iterpca=true", "'ffn.iter_pca'"),
        ("iter_pca=true", "'ffn.iter_pca'"),
        ("calibration.sedd=1", "'calibration.seed'"),
        ("sparsty=0.2", "'sparsity'"),
    ],
)
def test_unknown_option_has_nearest_match(sets: str, expected: str):
    assert f"Did you mean {expected}?" in message(sets=(sets,))


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ("attention.score=pearsn", "'pearson'"),
        ("ffn.score=magnitud", "'magnitude'"),
        ("ffn.repair=affin", "'affine'"),
        ("attention.repair=riddge", "'ridge'"),
        ("allocation.rule=fluctuations", "'fluctuation'"),
        ("attention.basis=channel", "'channels'"),
    ],
)
def test_unknown_values_of_a_choice_have_nearest_match(sets: str, expected: str):
    text = message(sets=(sets,))
    assert sets.split("=")[0] in text and f"Did you mean {expected}?" in text


@pytest.mark.parametrize("method", ["wanda-sp", "flap", "slimllm", "transact", "sobp"])
def test_methods_that_rank_no_mask_gradients_know_one_target(method: str):
    text = message({"method": method, "target": "vllm"})
    assert method in text and "--target transformers" in text
    options = load_recipe(None, {**BASE, "method": method}).options
    # Their budget and what they repair against must not follow the defaults of the default method.
    assert (options.attention.repair_against, options.ffn.repair_against) == ("own_output", "own_output")


def test_unknown_method_has_nearest_match():
    assert "Did you mean 'slimllm'?" in message({"method": "slimlm"})
    assert "Did you mean 'intraslice'?" in message({"method": "intraslce"})


def test_unknown_name_in_file(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("calibration:\n  num_sample: 3\n")
    assert "Did you mean 'calibration.num_samples'?" in message(path=path)
    path.write_text("calibraton:\n  num_samples: 3\n")
    assert "unknown option 'calibraton.num_samples'. Did you mean 'calibration.num_samples'?" == message(path=path)
    path.write_text("model: m\nsparsity: 0.3\ncalibraton: {}\n")
    assert message(path=path) == "unknown option 'calibraton'. Did you mean 'calibration'?"
    path.write_text("model: m\nsparsity: 0.3\ncalibration: {}\n")
    load_recipe(path)


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ("ffn.damping=much", "ffn.damping"),
        ("run.dtype=int8", "'bfloat16'"),
        ("allocation.rule=random", "'mask_gradient'"),
        ("calibration.num_samples=1.5", "calibration.num_samples"),
        ("ffn.damping", "name=value"),
        ("ffn.damping=[", "ffn.damping"),
    ],
)
def test_wrong_values(sets: str, expected: str):
    assert expected in message(sets=(sets,))


@pytest.mark.parametrize("content", ["- a\n- b\n", "just text", "a: [", "ffn: 3\n"])
def test_files_that_are_no_recipe(tmp_path: Path, content: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert "recipe" in message(path=path)


def test_missing_file_and_missing_values(tmp_path: Path):
    assert "cannot be read" in message(path=tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="no model"):
        load_recipe(None, {"sparsity": 0.3})
    with pytest.raises(RecipeError, match="no sparsity"):
        load_recipe(None, {"model": "m"})


def test_checked_without_torch():
    code = "import sys, intraslice.recipes.recipe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_target_is_a_preset_that_flags_win_over():
    recipe = load_recipe(
        None, {"model": "m", "sparsity": 0.3, "target": "llama.cpp", **parse_align("head=8,context=1")}
    )
    options = recipe.options
    assert options.allocation.shape_freedom == "width"
    multiples = (options.attention.head_multiple, options.attention.context_multiple, options.ffn.ffn_multiple)
    assert multiples == (8, 1, 256)
    both = load_recipe(None, {"model": "m", "sparsity": 0.3, "target": "vllm", "method": "ada-h"})
    assert both.options.allocation.shape_freedom == "layer" and not both.options.allocation.pca_ffn


def test_blocks_of_quantised_rows_fit_the_model():
    recipe = load_recipe(None, {"model": "m", "sparsity": 0.3, "target": "llama.cpp"})
    assert fitted(recipe, "llama", 4096).options.ffn.ffn_multiple == 256
    assert fitted(recipe, "llama", 576).options.ffn.ffn_multiple == 64
    free = load_recipe(None, {"model": "m", "sparsity": 0.3})
    assert fitted(free, "llama", 577) == free


@pytest.mark.parametrize("text", ["ffn", "ffn=x", "wide=3", "ffn=8;head=4", ""])
def test_wrong_alignments_are_refused(text):
    with pytest.raises(RecipeError, match="ffn=256,head=32"):
        parse_align(text)


def test_an_effort_is_a_preset_that_flags_win_over_and_is_recorded():
    recipe = load_recipe(None, BASE)
    assert (recipe.effort, recipe.options.distill.sites) == (DEFAULT_EFFORT, "none")
    assert recipe == load_recipe(None, {**BASE, "effort": DEFAULT_EFFORT})
    high = load_recipe(None, {**BASE, "effort": "high"}, ["distill.epochs=3"])
    assert (high.effort, high.options.distill.sites, high.options.distill.epochs) == ("high", "all", 3.0)
    assert load_recipe(None, {**BASE, "effort": "high"}, ["distill.sites=none"]).options.distill.sites == "none"
    assert recipe_from_dict(high.to_dict()) == high
    assert load_recipe(None, {**BASE, "method": "flap"}).effort is None


def test_efforts_that_a_method_does_not_know_are_refused():
    assert "unknown effort 'hihg'" in message({"effort": "hihg"}) and "'high'" in message({"effort": "hihg"})
    assert "method flap has one way to run" in message({"method": "flap", "effort": "low"})


def test_divergences_are_measured_before_gradients():
    text = message({"method": "llm-pruner"}, ("allocation.rule=divergence",))
    assert "allocation.rule = divergence" in text and "attention.score = taylor" in text


def test_an_unknown_target_is_named():
    with pytest.raises(RecipeError, match="unknown target 'llamacpp'.*Did you mean 'llama.cpp'"):
        load_recipe(None, {"model": "m", "sparsity": 0.3, "target": "llamacpp"})


@pytest.mark.parametrize("method", ["svd-llm", "slicegpt"])
def test_methods_that_change_what_a_layer_is_run_in_transformers_only(method: str):
    recipe = load_recipe(None, {**BASE, "method": method})
    expected = {"factors": {"measured_on": "dense_stream"}} if method == "svd-llm" else {}
    assert recipe.method_options() == expected and not recipe.entry.form.any_target
    with pytest.raises(RecipeError, match=f"method {method} .*leave out --target vllm"):
        load_recipe(None, {**BASE, "method": method, "target": "vllm"})
    if method == "slicegpt":
        with pytest.raises(RecipeError, match="opt does not have.*llama, mistral, qwen2, phi3"):
            fitted(recipe, "opt", 32)
    else:
        assert fitted(recipe, "opt", 32) == recipe


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("flap", {"attention.repair": "cross_fit"}),
        ("flap", {"ffn.repair": "cross_fit"}),
        ("flap", {"distill.sites": "ffn"}),
        ("intraslice", {"ffn.measured_on": "dense_layer", "ffn.iter_pca": True}),
    ],
)
def test_what_needs_the_pruned_stream_is_refused_elsewhere(method: str, options: dict):
    text = message({"method": method, **options})
    assert "measured_on" in text and "set it to pruned_stream" in text
