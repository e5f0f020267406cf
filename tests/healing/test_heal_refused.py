"""What a user can get wrong about healing: one sentence each, and nothing is left behind."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from intraslice.checkpoint.ownership import LIST_FILE
from intraslice.errors import (
    CalibrationError,
    CheckpointError,
    IntraSliceError,
    MissingExtraError,
    NumericalError,
    OutputError,
    RecipeError,
    UnsupportedModelError,
)
from intraslice.healing import run as healing_run
from intraslice.healing.after_prune import prune_and_heal
from intraslice.recipes.recipe import load_recipe
from support.progress import StopAt


@pytest.fixture
def refused(heal, tmp_path):
    """Return a function that heals, expects an error and returns its sentence."""

    def run(error: type[IntraSliceError], folder, **settings) -> str:
        with pytest.raises(error) as caught:
            heal(folder, **settings)
        sentence = str(caught.value)
        assert "\n" not in sentence
        assert not (tmp_path / "healed").exists() and not (tmp_path / "healed.partial").exists()
        return sentence

    return run


@pytest.fixture
def own_copy(pruned_folder, tmp_path):
    """Return a pruned folder that the test may change."""
    folder = shutil.copytree(pruned_folder(), tmp_path / "copy")
    # Without the list of digests: what is wrong with the files themselves is found too.
    (folder / LIST_FILE).unlink()
    return folder


@pytest.mark.parametrize("pruned_before", [True, False])
def test_an_accelerator_that_is_not_the_first(pruned_before, refused, small, tmp_path, monkeypatch):
    """Before anything is loaded: neither of the two models is there."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    if pruned_before:
        sentence = refused(RecipeError, tmp_path / "gone", device="cuda:1")
    else:
        recipe = load_recipe(
            flags={"model": str(tmp_path / "gone"), "output": str(tmp_path / "healed"), "sparsity": 0.4}
        )
        with pytest.raises(RecipeError) as caught:
            prune_and_heal(recipe, small(device="cuda:1"))
        sentence = str(caught.value)
    assert "'cuda:1' is number 1" in sentence and "CUDA_VISIBLE_DEVICES=1" in sentence


def test_teacher_of_another_family(pruned_folder, tiny_folder, refused):
    sentence = refused(UnsupportedModelError, pruned_folder(), teacher=str(tiny_folder("opt")))
    assert "family opt" in sentence and "llama" in sentence


def test_teacher_with_another_vocabulary(pruned_folder, tiny_folder, refused):
    sentence = refused(CheckpointError, pruned_folder(), teacher=str(tiny_folder("llama", vocab_size=280)))
    assert "280" in sentence and "272" in sentence


def test_teacher_whose_tokenizer_numbers_otherwise(pruned_folder, make_folder, refused):
    teacher = make_folder("llama")
    path = teacher / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(data))
    assert "same tokens" in refused(CheckpointError, pruned_folder(), teacher=str(teacher))


def test_teacher_that_is_pruned(pruned_folder, refused):
    assert "itself pruned" in refused(UnsupportedModelError, pruned_folder(), teacher=str(pruned_folder()))


def test_dense_model_that_is_gone(own_copy, refused, tmp_path):
    path = own_copy / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": str(tmp_path / "gone")}))
    sentence = refused(CheckpointError, own_copy)
    assert str(tmp_path / "gone") in sentence and "--teacher" in sentence


def test_no_record_of_the_dense_model(own_copy, refused):
    (own_copy / "result.json").unlink()
    assert "--teacher" in refused(RecipeError, own_copy)


def test_damaged_record(own_copy, refused):
    (own_copy / "result.json").write_text("{")
    assert "damaged" in refused(CheckpointError, own_copy)


def test_truncated_weights(own_copy, refused):
    weights = own_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated or corrupt" in refused(CheckpointError, own_copy)


def test_weights_that_are_missing(own_copy, refused):
    tensors = load_file(own_copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, own_copy / "model.safetensors", metadata={"format": "pt"})
    assert "up_proj" in refused(CheckpointError, own_copy)


def test_weights_that_are_not_numbers(own_copy, refused):
    tensors = load_file(own_copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, own_copy / "model.safetensors", metadata={"format": "pt"})
    assert "before the first step" in refused(NumericalError, own_copy)


def test_no_such_checkpoint(tmp_path, refused):
    assert "is not a checkpoint folder" in refused(CheckpointError, tmp_path / "nothing")


@pytest.mark.parametrize("content, word", [("", "empty"), ("too short", "tokens")])
def test_no_text(content, word, pruned_folder, tmp_path, refused):
    path = tmp_path / "short.txt"
    path.write_text(content)
    assert word in refused(CalibrationError, pruned_folder(), calibration=str(path))


def test_no_text_file(pruned_folder, tmp_path, refused):
    assert "no text file" in refused(CalibrationError, pruned_folder(), calibration=str(tmp_path / "no.txt"))


def test_budget_smaller_than_a_step(pruned_folder, refused):
    assert "smaller than one step" in refused(RecipeError, pruned_folder(), budget="127")
    assert "smaller than one step" in refused(RecipeError, pruned_folder(), budget="0.0001s")


def test_sequences_longer_than_the_model(pruned_folder, refused):
    assert "129" in refused(RecipeError, pruned_folder(), seqlen=129)


def test_hidden_states_of_another_size(pruned_folder, tiny_folder, refused):
    teacher = str(tiny_folder("llama", num_hidden_layers=2))
    assert "num_hidden_layers" in refused(RecipeError, pruned_folder(), teacher=teacher, hidden_weight=1.0)


@pytest.mark.parametrize("settings", [{"lr": 1e30}, {"lr": 30.0, "evaluate_every": 1}])
def test_divergence(settings, pruned_folder, refused):
    sentence = refused(NumericalError, pruned_folder(), **settings)
    assert "diverged" in sentence and "lower --lr" in sentence


def test_nothing_gained(pruned_folder, refused):
    sentence = refused(NumericalError, pruned_folder(), lr=1e-30)
    assert "never fell below its start" in sentence


def test_output_that_is_there(pruned_folder, heal, tmp_path):
    heal(pruned_folder())
    with pytest.raises(OutputError, match="already exists"):
        heal(pruned_folder())
    heal(pruned_folder(), overwrite=True)
    with pytest.raises(OutputError, match="would replace the input model"):
        heal(tmp_path / "healed", overwrite=True)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"lr": 2e-3}, "lr"),
        ({"budget": "1664"}, "budget"),
        ({"seed": 1}, "seed"),
        ({"precision": "bfloat16"}, "precision"),
    ],
)
def test_interrupted_with_other_settings(change, word, pruned_folder, heal, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        heal(pruned_folder(), progress=StopAt("healing (tokens)", 700))
    with pytest.raises(OutputError, match="--resume"):
        heal(pruned_folder())
    with pytest.raises(IntraSliceError, match=f"has {word} = "):
        heal(pruned_folder(), resume=True, **change)
    heal(pruned_folder(), resume=True)


def test_interrupted_and_the_text_has_changed(pruned_folder, heal, text, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text(text.read_text())
    with pytest.raises(KeyboardInterrupt):
        heal(pruned_folder(), calibration=str(own), progress=StopAt("healing (tokens)", 700))
    own.write_text(text.read_text().replace("fox", "cat"))
    with pytest.raises(IntraSliceError, match="other text"):
        heal(pruned_folder(), calibration=str(own), resume=True)
    heal(pruned_folder(), calibration=str(own), overwrite=True)


@pytest.mark.parametrize("package, weights", [("accelerate", "full"), ("peft", "lora")])
def test_missing_package(package, weights, pruned_folder, refused, monkeypatch):
    def absent(name: str):
        if name == package:
            raise ImportError(name)

    monkeypatch.setattr(healing_run.importlib, "import_module", absent)
    sentence = refused(MissingExtraError, pruned_folder(), weights=weights)
    assert package in sentence and "intraslice[heal]" in sentence
