"""Recipes and records of the release before: read for one release, under today's names, with a note."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from intraslice.errors import RecipeError
from intraslice.methods.registry import METHODS
from intraslice.recipes.merge import flatten, merge
from intraslice.recipes.old_names import OLD_NAMES, RENAMED
from intraslice.recipes.recipe import load_recipe
from intraslice.results.result import LayerRecord, PruneResult, layer_record_from_dict
from intraslice.runtime.families_intraslice import LayerShape

# The recipe in a result.json of that release, which recorded every option, whether it was read or not.
GENERAL: dict[str, Any] = {
    "model": "org/model",
    "revision": None,
    "trust_remote_code": False,
    "output": "out",
    "target": "transformers",
    "sparsity": 0.3,
    "target_speedup": None,
    "speedup_of": "decode",
    "architecture": "block",
    "calibration": {"source": "wikitext2", "num_samples": 64, "seqlen": 1024, "seed": 1, "text_field": None},
    "run": {
        "device": "cpu",
        "dtype": "auto",
        "matmul": "exact",
        "batch_tokens": 2048,
        "boundary_bytes": 1 << 29,
        "hidden_states": "memory",
        "max_shard_bytes": 1 << 30,
        "scan_folder": "",
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "allocation": {
        "name": "mask_gradient",
        "pca_attention": True,
        "pca_ffn": True,
        "ffn_bias": 1.15,
        "count": "weights",
        "similarity_scale": 10.0,
        "max_block_sparsity": 0.9,
        "num_ffn_blocks": 32,
        "shapes": "free",
    },
    "attention": {
        "score": "energy",
        "adaptive_heads": True,
        "keep_heads": False,
        "basis": "pca",
        "min_head_fraction": 0.75,
        "head_multiple": 4,
        "context_multiple": 1,
        "repair": "ridge",
        "damping": 0.05,
        "shrink_to": "weights",
        "target": "model",
        "groups": "ragged",
    },
    "ffn": {
        "score": "energy",
        "repair": "ridge",
        "damping": 0.1,
        "shrink_to": "weights",
        "target": "model",
        "ffn_multiple": 8,
        "iter_pca": False,
        "iter_pca_fraction": 0.1,
        "iter_pca_rounds": 2,
        "iter_pca_slice": 0,
        "iter_pca_steps": 20,
        "iter_pca_lr": 0.001,
    },
}
# What the presets changed of it.
WHOLE, TO_BLOCK = {"adaptive_heads": False}, {"target": "block"}
NO_CORRECTION = {"pca_attention": False, "pca_ffn": False}
PRESETS: dict[str, dict[str, Any]] = {
    "intraslice": {},
    "iter-pca": {"ffn": {"iter_pca": True}},
    "ada-h": {"allocation": NO_CORRECTION},
    "naive": {"allocation": NO_CORRECTION, "attention": WHOLE},
    "wanda-sp": {
        "allocation": {"name": "uniform", "ffn_bias": 1.0, "count": "units"},
        "attention": {"score": "norm", "repair": "none", **WHOLE, **TO_BLOCK},
        "ffn": {"score": "norm", "repair": "none", **TO_BLOCK},
    },
    "flap": {
        "allocation": {"name": "fluctuation", "count": "units"},
        "attention": {"score": "fluctuation", "repair": "bias", **WHOLE, **TO_BLOCK},
        "ffn": {"score": "fluctuation", "repair": "bias", **TO_BLOCK},
    },
    "slimllm": {
        "allocation": {"name": "similarity", "ffn_bias": 1.0, "count": "units"},
        "attention": {"score": "pearson", "repair": "affine", **WHOLE, **TO_BLOCK},
        "ffn": {"score": "feature", "repair": "affine", **TO_BLOCK},
    },
    "transact": {
        "allocation": {"name": "uniform", "ffn_bias": 1.0},
        "attention": {"keep_heads": True, "basis": "channels", "repair": "none", **TO_BLOCK},
        "ffn": {"score": "magnitude", "repair": "none", **TO_BLOCK},
    },
    "sobp": {
        "allocation": {"name": "head_search", "count": "units"},
        "attention": {"score": "obs", "damping": 0.01, **WHOLE, **TO_BLOCK},
        "ffn": {"score": "obs", "damping": 0.01, **TO_BLOCK},
    },
    "paper": {
        "allocation": {"ffn_bias": 1.0},
        "attention": {"shrink_to": "zero", "damping": 0.01, **TO_BLOCK},
        "ffn": {"shrink_to": "zero", "damping": 0.01, "iter_pca": True, **TO_BLOCK},
    },
    "svd-llm": {"architecture": "factors"},
    "slicegpt": {"architecture": "residual"},
}
BASE = {"model": "m", "sparsity": 0.3}


def old_recipe(method: str, **changes: Any) -> dict[str, Any]:
    return merge(merge({**GENERAL, **OPTIONS, "method": method}, PRESETS[method]), changes)


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def test_the_old_form_has_all_of_its_options_and_every_method():
    assert sum(map(len, OPTIONS.values())) == 33
    newer = {"modegpt", "llm-pruner", "llm-surgeon", "disp-llm", "tyr"}
    assert PRESETS.keys() == METHODS.keys() - newer
    # Every name that only earlier releases had is among them.
    assert set(OLD_NAMES) <= flatten(old_recipe("intraslice")).keys()


# Where presets have changed since, a record keeps what it says.
CHANGED: dict[str, dict[str, Any]] = {
    "wanda-sp": {"allocation.budget_unit": "units", "attention.gqa_groups": "ragged"},
    "flap": {"allocation.max_site_sparsity": 0.9},
    "sobp": {"allocation.max_site_sparsity": 0.9},
    "paper": {"attention.head_multiple": 4},
}


@pytest.mark.parametrize("method", PRESETS)
def test_an_old_record_is_todays_preset(method: str, tmp_path: Path):
    old = load_recipe(write(tmp_path / "recipe.yaml", old_recipe(method)))
    today = {name: value for name, value in GENERAL.items() if name not in ("architecture", "run", "calibration")}
    today |= {**flatten({"calibration": GENERAL["calibration"]}), "run.device": "cpu", "method": method}
    today |= CHANGED.get(method, {}) | ({"effort": "low"} if METHODS[method].efforts else {})
    new = load_recipe(None, today)
    assert old.model_copy(update={"notes": ()}) == new
    assert old.to_dict() == new.to_dict()
    renamed, left_out = old.notes
    for name, today_name in RENAMED.items():
        assert f"{name} is now {today_name}" in renamed
    assert "attention.adaptive_heads is now attention.heads" in renamed and "architecture is now method" in renamed
    assert f"method {method} does not read them" in left_out
    # Exactly what the method does not read is left out.
    read = new.options.read()
    assert ("allocation.similarity_scale" in left_out) is ("allocation.similarity_scale" not in read)
    assert ("ffn.iter_pca_rounds" in left_out) is ("ffn.iter_pca_rounds" not in read)


@pytest.mark.parametrize("target", ["vllm", "llama.cpp", "stock"])
def test_an_old_record_of_a_target_is_todays_target(target: str, tmp_path: Path):
    shapes = {
        "vllm": {"allocation": {"shapes": "layer"}, "attention": {"head_multiple": 16}, "ffn": {"ffn_multiple": 32}},
        "llama.cpp": {
            "allocation": {"shapes": "width"},
            "attention": {"head_multiple": 16, "context_multiple": 32},
            "ffn": {"ffn_multiple": 256},
        },
        "stock": {"allocation": {"shapes": "model"}, "attention": {"head_multiple": 8}},
    }[target]
    old = load_recipe(write(tmp_path / "recipe.yaml", old_recipe("intraslice", target=target, **shapes)))
    new = load_recipe(None, {**BASE, "effort": "low", "target": target})
    assert old.options == new.options and old.target == target


def test_an_old_record_with_changed_options_keeps_them(tmp_path: Path):
    changes = {
        "allocation": {"ffn_bias": 0.9, "max_block_sparsity": 0.7, "num_ffn_blocks": 8, "count": "units"},
        "attention": {"groups": "uniform", "target": "block", "damping": 0.2, "score": "obs", "adaptive_heads": False},
        "ffn": {"iter_pca": True, "iter_pca_steps": 5},
        "run": {"scan_folder": "kept"},
    }
    recipe = load_recipe(write(tmp_path / "recipe.yaml", old_recipe("intraslice", **changes)))
    allocation, attention, ffn = recipe.options.allocation, recipe.options.attention, recipe.options.ffn
    assert (allocation.ffn_share, allocation.max_site_sparsity) == (0.9, 0.7)
    assert (allocation.num_channel_groups, allocation.budget_unit) == (8, "units")
    assert (attention.gqa_groups, attention.repair_against, attention.heads) == ("uniform", "own_output", "whole")
    # One number was both lambdas.
    assert (attention.score, attention.damping, attention.obs_damping) == ("obs", 0.2, 0.2)
    assert (ffn.iter_pca, ffn.iter_pca_steps, ffn.damping) == (True, 5, 0.1)
    assert recipe.run.gradient_folder == "kept"


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("allocation.name=uniform", "allocation.rule", "uniform"),
        ("allocation.ffn_bias=0.9", "allocation.ffn_share", 0.9),
        ("allocation.count=units", "allocation.budget_unit", "units"),
        ("allocation.shapes=layer", "allocation.shape_freedom", "layer"),
        ("allocation.max_block_sparsity=0.8", "allocation.max_site_sparsity", 0.8),
        ("allocation.num_ffn_blocks=4", "allocation.num_channel_groups", 4),
        ("attention.groups=uniform", "attention.gqa_groups", "uniform"),
        ("attention.target=block", "attention.repair_against", "own_output"),
        ("attention.target=model", "attention.repair_against", "dense_stream"),
        ("ffn.target=block", "ffn.repair_against", "own_output"),
        ("run.scan_folder=kept", "run.gradient_folder", "kept"),
        ("attention.adaptive_heads=false", "attention.heads", "whole"),
        ("attention.adaptive_heads=true", "attention.heads", "adaptive"),
        ("attention.keep_heads=true", "attention.heads", "all"),
    ],
)
def test_old_names_work_with_a_note(text: str, name: str, value: Any):
    old = text.partition("=")[0]
    recipe = load_recipe(None, BASE, [text])
    (note,) = recipe.notes
    assert f"{old} is now {name}" in note and "the next release will not know them" in note
    assert flatten(recipe.to_dict())[name] == value
    assert recipe.model_copy(update={"notes": ()}) == load_recipe(None, BASE, [f"{name}={value}"])
    # The Python interface and the flags go the same way.
    given = text.partition("=")[2]
    flag = {old: {"true": True, "false": False}.get(given, given)}
    assert load_recipe(None, {**BASE, **flag}).options == recipe.options


@pytest.mark.parametrize(
    ("method", "sets", "heads"),
    [
        # Two options of earlier releases were set one by one; keep_heads won.
        ("transact", ["keep_heads=false"], "adaptive"),
        ("transact", ["keep_heads=false", "adaptive_heads=false"], "whole"),
        ("transact", ["adaptive_heads=false"], "all"),
        ("wanda-sp", ["keep_heads=false"], "whole"),
        ("wanda-sp", ["adaptive_heads=true"], "adaptive"),
        ("intraslice", ["keep_heads=false"], "adaptive"),
        ("intraslice", ["keep_heads=true", "adaptive_heads=false"], "all"),
    ],
)
def test_the_old_options_of_heads_mean_what_they_meant(method: str, sets: list[str], heads: str, tmp_path: Path):
    given = [f"attention.{text}" for text in sets]
    recipe = load_recipe(None, {**BASE, "method": method}, given)
    assert recipe.options.attention.heads == heads
    # The same from a file, and one over a file.
    content = {text.partition("=")[0]: text.endswith("true") for text in sets}
    path = write(tmp_path / "recipe.yaml", {**BASE, "method": method, "attention": content})
    assert load_recipe(path).options.attention.heads == heads
    new = write(tmp_path / "new.yaml", {**BASE, "method": "intraslice", "attention": {"heads": "all"}})
    assert load_recipe(new, None, ["attention.keep_heads=false"]).options.attention.heads == "adaptive"


@pytest.mark.parametrize(("architecture", "method"), [("factors", "svd-llm"), ("residual", "slicegpt")])
def test_an_architecture_is_a_method(architecture: str, method: str, tmp_path: Path):
    recipe = load_recipe(write(tmp_path / "recipe.yaml", {**BASE, "architecture": architecture}))
    assert recipe.method == method
    assert recipe.notes[0].startswith("names of an earlier release were read: architecture is now method;")
    assert load_recipe(None, {**BASE, "method": method}, [f"architecture={architecture}"]).method == method
    # A method that is named later than both wins.
    both = write(tmp_path / "both.yaml", {**BASE, "method": method, "architecture": architecture})
    assert load_recipe(both, {"method": "flap"}).method == "flap"


@pytest.mark.parametrize(
    ("architecture", "method", "means"),
    [
        ("factors", "flap", "method svd-llm"),
        ("residual", "intraslice", "method slicegpt"),
        ("factors", "slicegpt", "method svd-llm"),
        ("block", "svd-llm", "all methods but svd-llm and slicegpt"),
    ],
)
def test_an_architecture_of_another_method_is_refused(architecture: str, method: str, means: str, tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", {**BASE, "method": method, "architecture": architecture})
    sentence = f"architecture {architecture} is what earlier releases called {means}, .* is {method}; leave out"
    for call in (
        lambda: load_recipe(path),
        lambda: load_recipe(None, {**BASE, "method": method}, [f"architecture={architecture}"]),
        lambda: load_recipe(None, {**BASE, "method": method, "architecture": architecture}),
    ):
        with pytest.raises(RecipeError, match=sentence):
            call()


@pytest.mark.parametrize("architecture", ["blocks", None, ["factors"]])
def test_an_unknown_architecture_is_refused(architecture: Any, tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", {**BASE, "architecture": architecture})
    with pytest.raises(RecipeError, match="architecture must be one of 'block', 'factors', 'residual', got"):
        load_recipe(path)


def test_every_old_name_has_a_test():
    marks = [mark for mark in test_old_names_work_with_a_note.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    tested = {case[0].partition("=")[0] for case in marks[0].args[1]}
    assert tested == set(OLD_NAMES) - {"architecture"}


@pytest.mark.parametrize(
    ("sets", "new"),
    [
        (("allocation.ffn_bias=0.9", "allocation.ffn_share=1.0"), "allocation.ffn_share"),
        (("allocation.ffn_share=1.0", "allocation.ffn_bias=0.9"), "allocation.ffn_share"),
        (("attention.target=block", "attention.repair_against=dense_stream"), "attention.repair_against"),
        (("attention.adaptive_heads=false", "attention.heads=adaptive"), "attention.heads"),
        (("attention.keep_heads=true", "attention.heads=whole"), "attention.heads"),
    ],
)
def test_an_old_and_a_new_name_that_disagree_are_refused(sets: tuple[str, ...], new: str):
    with pytest.raises(RecipeError, match=f"earlier releases called {new}.*different values.*keep only {new}"):
        load_recipe(None, BASE, sets)


def test_an_old_and_a_new_name_that_agree_are_read():
    recipe = load_recipe(None, BASE, ["ffn.target=block", "ffn.repair_against=own_output"])
    assert recipe.options.ffn.repair_against == "own_output"


def test_a_later_source_wins_whatever_the_name(tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", old_recipe("intraslice", allocation={"ffn_bias": 0.9}))
    assert load_recipe(path, {"allocation.ffn_share": 1.2}).options.allocation.ffn_share == 1.2
    new = write(tmp_path / "new.yaml", {**BASE, "allocation": {"ffn_share": 0.9}})
    assert load_recipe(new, None, ["allocation.ffn_bias=1.2"]).options.allocation.ffn_share == 1.2


def test_what_an_old_record_is_given_besides_is_still_checked(tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", old_recipe("flap"))
    with pytest.raises(RecipeError, match=r"method flap as given does not read attention\.damping"):
        load_recipe(path, {"attention.damping": 0.2})
    unknown = write(tmp_path / "unknown.yaml", {**old_recipe("flap"), "colour": "red"})
    with pytest.raises(RecipeError, match="unknown option 'colour'"):
        load_recipe(unknown)


def test_todays_file_is_not_forgiven_what_an_old_record_is(tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", {**BASE, "method": "flap", "attention": {"damping": 0.2}})
    with pytest.raises(RecipeError, match=r"method flap as given does not read attention\.damping"):
        load_recipe(path)


def test_an_old_layer_record_still_loads():
    shape = LayerShape(heads_per_kv=(2, 1), qk_head_dim=8, v_head_dim=8, intermediate_size=40)
    old = {
        "layer": 3,
        "shape": shape.to_dict(),
        "num_parameters": 700,
        "attention_error": 0.25,
        "ffn_error": 0.5,
        "heads": [0, 1, 2],
        "seconds": 1.5,
        "iter_pca": True,
    }
    record = layer_record_from_dict(json.loads(json.dumps(old)))
    assert record == LayerRecord(
        layer=3,
        shape=shape,
        num_parameters=700,
        errors={"attention": 0.25, "ffn": 0.5},
        heads=(0, 1, 2),
        seconds=1.5,
        iter_pca=True,
    )
    assert old["attention_error"] == 0.25, "the record that was given is left as it is"


def test_an_old_result_still_loads(tmp_path: Path):
    shape = {"heads_per_kv": [2, 2], "qk_head_dim": 8, "v_head_dim": 8, "intermediate_size": 40}
    layer = {"layer": 0, "shape": shape, "num_parameters": 70, "attention_error": 0.1, "ffn_error": 0.2}
    numbers = dict.fromkeys(
        (
            *("dense_layer_parameters", "pruned_layer_parameters", "dense_parameters", "pruned_parameters"),
            *("dense_bytes", "pruned_bytes", "peak_memory_bytes"),
        ),
        100,
    )
    old = {
        **numbers,
        **{name: "x" for name in ("output", "model", "family", "method", "device", "dtype", "command")},
        "requested_sparsity": 0.3,
        "sparsity": 0.3,
        "layers": [{**layer, "heads": [0, 1, 2, 3], "seconds": 0.5, "iter_pca": False}],
        "seconds": {"allocation": 1.0, "layers": 2.0, "write": 0.5, "total": 3.5},
        "calibration": {"name": "walk", "num_samples": 4},
        "versions": {"intraslice": "0.1.0"},
        "recipe": old_recipe("intraslice"),
    }
    (tmp_path / "result.json").write_text(json.dumps(old))
    result = PruneResult.load(tmp_path)
    assert result.layers[0].errors == {"attention": 0.1, "ffn": 0.2}
    assert result.seconds["allocation"] == 1.0
    assert PruneResult.from_dict(json.loads(result.to_json())) == result


ROOT = Path(__file__).parents[1]


def test_nothing_that_we_show_uses_what_only_earlier_releases_had():
    shown = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown += [path for folder in ("examples", "benchmarks", "recipes") for path in (ROOT / folder).rglob("*.*")]
    assert len(shown) > 20
    gone = [rf"\b{re.escape(name)}\b" for name in OLD_NAMES if "." in name]
    # In YAML the two parts of a name stand in two lines.
    gone += [rf"^ *{name}:" for name in ("adaptive_heads", "keep_heads", "ffn_bias", "scan_folder", "architecture")]
    gone += [r"\banalyse\("]
    found = [
        (path.name, match.group()) for path in shown for match in re.finditer("|".join(gone), path.read_text(), re.M)
    ]
    assert found == []
