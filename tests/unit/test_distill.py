"""Local distillation lowers the held-out error from where the repair leaves it, and leaves what it cannot better."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intraslice.errors import RecipeError
from intraslice.methods.blockwise.distill import num_held_out
from support.prune import calibration, prune, weights_of
from support.tiny import make_tiny

TRAINED = {"distill__sites": "all", "distill__epochs": 8, "distill__learning_rate": 3e-3}
UNREPAIRED = {"attention__repair": "none", "ffn__repair": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("m"), num_attention_heads=8, intermediate_size=160)


def test_training_lowers_the_error_on_sequences_that_it_has_not_seen(folder, tmp_path):
    result = prune(folder, tmp_path / "out", sparsity=0.4, **TRAINED, **UNREPAIRED)
    errors = [layer.distilled for layer in result.layers]
    assert all(set(sites) == {"attention", "ffn"} for sites in errors)
    assert all(after <= before for sites in errors for before, after in sites.values())
    assert sum(after < before for sites in errors for before, after in sites.values()) >= 2


def test_what_does_not_help_on_held_out_text_changes_nothing(folder, tmp_path):
    # A step that moves every weight by its own size makes everything worse.
    wild = {**TRAINED, "distill__learning_rate": 1.0}
    plain, trained = (
        prune(folder, tmp_path / name, sparsity=0.4, **changes) for name, changes in (("plain", {}), ("trained", wild))
    )
    assert all(before == after for layer in trained.layers for before, after in layer.distilled.values())
    assert all(not layer.distilled for layer in plain.layers)
    first, second = weights_of(tmp_path / "plain"), weights_of(tmp_path / "trained")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("sites", ["attention", "ffn"])
def test_only_the_sites_that_are_named_are_trained(sites, folder, tmp_path):
    result = prune(folder, tmp_path / "out", sparsity=0.4, **{**TRAINED, "distill__sites": sites}, **UNREPAIRED)
    assert all(set(layer.distilled) == {sites} for layer in result.layers)


def test_held_out_batches_are_a_share_and_never_all_or_none():
    assert [num_held_out(count, 0.25) for count in (2, 4, 8, 40)] == [1, 1, 2, 10]
    assert num_held_out(3, 0.99) == 2


def test_one_batch_is_too_little(folder, tmp_path):
    with pytest.raises(RecipeError, match="two batches of calibration text.*there is 1"):
        prune(folder, tmp_path / "out", on=calibration(1, 32), distill__sites="all")
    assert not (tmp_path / "out").exists()
