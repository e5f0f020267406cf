"""A size as the budget: parameters or bytes of the saved model, never more than asked for, and near to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intraslice import api
from intraslice.cli.app import main
from intraslice.errors import BudgetError, RecipeError
from intraslice.numbers import parse_count, parse_size
from intraslice.recipes.recipe import load_recipe
from intraslice.results.result import PruneResult
from support.prune import BLOCKWISE, fine_steps

SMALL = {"calibration.source": "builtin", "calibration.num_samples": 4, "calibration.seqlen": 32}
FLAGS = [
    "--calibration",
    "builtin",
    "--num-samples",
    "4",
    "--seqlen",
    "32",
    "--set",
    "attention.head_multiple=2",
    "--set",
    "ffn.ffn_multiple=1",
]


def prune(folder: Path, out: Path, method: str = "intraslice", dtype: str = "float32", **target: int | str):
    options = {**SMALL, **fine_steps(method), "run.dtype": dtype}
    return api.prune(str(folder), output=out, method=method, options=options, **target)


@pytest.mark.parametrize("method", [*BLOCKWISE, "svd-llm"])
def test_the_model_has_at_most_so_many_parameters(method, tiny_folder, tmp_path: Path):
    folder = tiny_folder("llama")
    result = prune(folder, tmp_path / "out", method, target_parameters=38_000)
    # Half a channel of 96 weights, biases of whole layers, ranks in steps of 8 x 96.
    assert 38_000 - 1_000 <= result.pruned_parameters <= 38_000
    assert result.recipe["target_parameters"] == 38_000 and result.recipe["sparsity"] == result.requested_sparsity


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(("dtype", "target"), [("float32", 152_000), ("bfloat16", 76_000)])
def test_the_files_have_at_most_so_many_bytes(family, tied, dtype, target, tiny_folder, tmp_path: Path):
    folder = tiny_folder(family, tie_word_embeddings=tied)
    target -= tied * 272 * 32 * (4 if dtype == "float32" else 2)
    result = prune(folder, tmp_path / "out", "flap", dtype, target_size=target)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert on_disk == result.pruned_bytes <= target
    # Headers and indices are bounds; a layer's worth of them is the price of never being larger.
    assert result.pruned_bytes >= target - 9_000


def test_several_files_are_counted_with_their_headers(tiny_folder, tmp_path: Path):
    folder = tiny_folder("llama", hidden_size=256, intermediate_size=512, vocab_size=2_000)
    options = {**SMALL, "run.max_shard_bytes": 1 << 20}
    result = api.prune(str(folder), output=tmp_path / "out", target_size="10MB", options=options)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5
    assert 9_900_000 < sum(path.stat().st_size for path in files) == result.pruned_bytes <= 10_000_000


@pytest.mark.parametrize("target", ["llama.cpp", "vllm", "stock"])
def test_shapes_for_a_runtime_meet_it_too(target, tiny_folder, tmp_path: Path):
    folder = tiny_folder("llama", hidden_size=64, num_hidden_layers=4)
    options = {**SMALL, "attention.head_multiple": 2, "ffn.ffn_multiple": 1, "attention.context_multiple": 1}
    result = api.prune(str(folder), output=tmp_path / "o", target=target, target_parameters=85_000, options=options)
    assert result.pruned_parameters <= 85_000


def test_dry_run_says_which_sparsity(tiny_folder, tmp_path: Path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = str(tiny_folder("llama"))
    assert main(["prune", folder, "-o", "out", "--target-parameters", "38K", *FLAGS, "--dry-run", "--json"]) == 0
    captured = capfd.readouterr()
    plan = json.loads(captured.out)
    sparsity = plan["recipe"]["sparsity"]
    assert plan["recipe"]["target_parameters"] == 38_000 and f"sparsity {sparsity:g}" in captured.err
    assert 38_000 - 96 <= plan["target_parameters"] <= 38_000
    assert list(tmp_path.iterdir()) == []
    # The run takes the same sparsity.
    assert main(["prune", folder, "-o", "out", "--target-parameters", "38K", *FLAGS]) == 0
    assert "for at most 38,000 parameters" in capfd.readouterr().out
    assert PruneResult.load(tmp_path / "out").requested_sparsity == sparsity


@pytest.mark.parametrize(("name", "unit"), [("target_parameters", ""), ("target_size", " bytes")])
def test_what_cannot_be_reached_is_refused_with_what_can(name, unit, tiny_folder, tmp_path: Path):
    folder = tiny_folder("llama")
    with pytest.raises(BudgetError, match="embeddings, norms and head stay.* is the smallest") as caught:
        prune(folder, tmp_path / "out", **{name: "10K"})
    smallest = int(str(caught.value).rsplit("; ", 1)[1].split(" ")[0].replace(",", ""))
    assert list(tmp_path.iterdir()) == []
    result = prune(folder, tmp_path / "out", **{name: smallest})
    assert (result.pruned_bytes if unit else result.pruned_parameters) <= smallest
    with pytest.raises(BudgetError, match="cannot be reached"):
        prune(folder, tmp_path / "smaller", **{name: smallest - 50})


@pytest.mark.parametrize("name", ["target_parameters", "target_size"])
def test_more_than_the_dense_model_is_refused(name, tiny_folder, tmp_path: Path):
    with pytest.raises(BudgetError, match="is more than the .* of the dense model, so there is nothing to remove"):
        prune(tiny_folder("llama"), tmp_path / "out", **{name: "1B" if name == "target_parameters" else "1GB"})
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_file_gives_a_size(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ntarget_size: 3.5GiB\n")
    recipe = load_recipe(path)
    assert recipe.target_size == int(3.5 * 2**30) and recipe.sparsity is None
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"sparsity": 0.3, "target_parameters": "6B"}, "sparsity 0.3 and target_parameters 6B are both given"),
        ({"target_size": "4GB", "target_parameters": "6B", "sparsity": 0}, "are all given; .* keep only one"),
        ({"target_speedup": 1.5, "target_size": "4GB"}, "target_speedup 1.5 and target_size 4GB are both given"),
        ({}, "--target-parameters 6B or --target-size 4GB"),
        ({"target_parameters": "6GB"}, "target_parameters must be a number greater than 0, for example 6B or 500M"),
        ({"target_parameters": "0"}, "greater than 0"),
        ({"target_parameters": True}, "greater than 0"),
        ({"target_size": "-4GB"}, "target_size must be a number greater than 0, for example 4GB or 800MB, got '-4GB'"),
        ({"target_size": "4GB", "method": "slicegpt"}, "method slicegpt changes them as well; give --sparsity instead"),
    ],
)
def test_wrong_targets_are_refused(flags, expected):
    with pytest.raises(RecipeError, match=expected):
        load_recipe(None, {"model": "m", **flags})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6B", 6e9),
        ("1.5b", 1.5e9),
        ("500M", 5e8),
        ("12k", 12e3),
        (7_000_000, 7e6),
        ("6e9", 6e9),
        (6e9, 6e9),
        ("6,100M", 61e8),
    ],
)
def test_counts_for_people(text, number):
    assert parse_count(text) == number


@pytest.mark.parametrize(
    ("text", "number"), [("4GB", 4e9), ("800 MB", 8e8), ("4G", 4e9), ("1GiB", 2**30), ("9kb", 9e3)]
)
def test_sizes_for_people(text, number):
    assert parse_size(text) == number


@pytest.mark.parametrize("text", ["", "GB", "4 XB", "nan", "1/2", "-1", None, "4GBB"])
def test_what_is_no_number(text):
    assert parse_count(text) is None and parse_size(text) is None
