"""Týr-the-Pruner: levels against pruning at once, judged models against plain ones, the search against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from intraslice.checkpoint.source import open_checkpoint
from intraslice.errors import RecipeError
from intraslice.methods.blockwise import search_pass
from intraslice.methods.blockwise.options import BlockwiseOptions
from intraslice.methods.presets import TYR
from intraslice.placement import Placement
from intraslice.progress import SilentProgress
from intraslice.recipes.recipe import load_recipe
from intraslice.streaming.hidden import embedded_states
from intraslice.streaming.model import StreamedModel
from intraslice.streaming.propagate import propagate_layer
from support import prune as support
from support.family_cases import family_model
from support.progress import Notes, StopAt
from support.tiny import tiny_tokenizer

SIZES: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3}
FEW = {"allocation__search_levels": 3, "allocation__search_generations": 4, "allocation__search_offspring": 6}
# Of attention, then of the FFN, in each layer.
LADDERS = [{-1: 0.0, 0: 0.25, 1: 0.5}, {0: 0.25, 1: 0.5}] * 3


def options_of(method: str = "tyr", **values: Any) -> BlockwiseOptions:
    flags = {"model": "m", "sparsity": 0.3, "method": method, "ffn.ffn_multiple": 1, **values}
    options = load_recipe(None, flags).options
    sites = {
        name: replace(getattr(options, name), repair_against="own_output", measured_on="pruned_stream")
        for name in ("attention", "ffn")
    }
    return replace(options, **sites)


@pytest.fixture
def streamed(tiny_folder: Callable[..., Path]) -> StreamedModel:
    placement = Placement.choose("cpu", "auto", torch.float32)
    return StreamedModel(open_checkpoint(str(tiny_folder("llama", **SIZES))), placement, (2, 24))


def filled(model: StreamedModel, folder: Path, options: BlockwiseOptions) -> search_pass._Store:
    store = search_pass._Store(model, folder)
    with torch.no_grad():
        store.fill(support.calibration(4, 24).tokens, LADDERS, options, "round 1 of 1", SilentProgress())
    return store


def outcome(model: StreamedModel, store: Any, levels: tuple[int, ...], tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of one model, run by itself."""
    states = embedded_states(model, tokens, None)
    for index in range(model.num_layers):
        of_layer = dict(zip(("attention", "ffn"), levels[2 * index : 2 * index + 2], strict=True))
        propagate_layer(store.layer(index, of_layer), states)
    return torch.cat([model.model.lm_head(model.after_layers(tokens[p], states.read(p))) for p in states.slices()])


@torch.no_grad()
@pytest.mark.parametrize("method", ["tyr", "intraslice", "slimllm"])
def test_a_level_has_the_size_that_it_should(streamed, tmp_path, method):
    """slimllm's repair adds biases, which sites that lose nothing must get as well."""
    given: dict[str, Any] = {"allocation.rule": "search"} if method != "tyr" else {}
    if method == "intraslice":
        given |= {"attention.head_multiple": 2, "attention.min_head_fraction": 0.5}
    if method == "slimllm":
        given |= {"attention.score": "norm", "ffn.score": "norm"}
    store = filled(streamed, tmp_path, options_of(method, **given))
    for index, (attention, ffn) in itertools.product(range(3), itertools.product((-1, 0, 1), (0, 1))):
        layer = store.layer(index, {"attention": attention, "ffn": ffn})
        assert layer.shape.intermediate_size == 64 * (0.75 if ffn == 0 else 0.5)
        whole = streamed.dense_shapes[index]
        kept = streamed.spec.num_parameters(replace(layer.shape, intermediate_size=0), 32)
        dense = streamed.spec.num_parameters(replace(whole, intermediate_size=0), 32)
        assert kept <= dense * (1.0 - LADDERS[0][attention]) + 1e-9
        assert (layer.shape.qk_head_dim, layer.shape.heads_per_kv) == (
            (whole.qk_head_dim, whole.heads_per_kv)
            if attention == -1
            else (layer.shape.qk_head_dim, layer.shape.heads_per_kv)
        )
        assert torch.isfinite(outcome(streamed, store, (attention, ffn) * 3, support.calibration(2, 24).tokens)).all()


@torch.no_grad()
def test_models_side_by_side_are_judged_like_models_by_themselves(streamed, tmp_path, monkeypatch):
    monkeypatch.setattr("intraslice.methods.blockwise.predictions.JUDGED_POSITIONS", 10_000)
    store, tokens = filled(streamed, tmp_path, options_of()), support.calibration(6, 24, seed=3).tokens
    models = [(0,) * 6, (1, 0, -1, 0, 0, 0), (1, 0, -1, 0, 0, 1), (0, 0, 0, 0, 1, 1), (-1, 0, -1, 0, -1, 0)]
    dense = support.load(streamed.checkpoint.folder)
    for batches, count in ((1, 2), (3, 6)):
        expected = dense(tokens[:count]).logits.log_softmax(-1)
        wanted = [
            float(
                (expected.exp() * (expected - outcome(streamed, store, one, tokens[:count]).log_softmax(-1)))
                .sum(-1)
                .mean()
            )
            for one in models
        ]
        for memory in (1, 1 << 30):  # one model at a time, and all at once
            judge = search_pass._Judge(store, tokens, memory)
            assert judge.batches == 3
            assert judge.divergences(models, batches) == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert wanted[1] != wanted[2]


@torch.no_grad()
def test_the_search_finds_the_best_model(streamed, tmp_path):
    """Of all that can be reached with attention alone."""
    options = options_of(**{"allocation.search_generations": 12, "allocation.search_offspring": 12})
    store, tokens = filled(streamed, tmp_path, options), support.calibration(4, 24, seed=3).tokens
    ladders = [LADDERS[0], {0: 0.25}] * 3
    judge = search_pass._Judge(store, tokens, 1 << 30)
    best = search_pass._evolve(judge, ladders, "round 1 of 1", Notes(), options)
    reachable = [one for one in itertools.product((-1, 0, 1), repeat=3) if sum(one) == 0]
    models = [(a, 0, b, 0, c, 0) for a, b, c in reachable]
    found = dict(zip(models, judge.divergences(models, judge.batches), strict=True))
    assert len(models) == 7 and best == min(models, key=found.__getitem__)


def test_the_budget_is_met_and_an_interrupted_search_goes_on(tiny_folder, tmp_path):
    folder = tiny_folder("llama", **SIZES)
    notes = Notes()
    whole = support.prune(folder, tmp_path / "whole", "tyr", progress=notes, **FEW)
    assert whole.sparsity == pytest.approx(0.3, abs=0.005)
    said = [note for note in notes.notes if "KL divergence" in note]
    assert len(said) == 2 and all(float(a) >= float(b) for a, b in (_numbers(note) for note in said))
    for place, at in (("levels, round 1 of 2", 2), ("search, round 1 of 2", 1), ("levels, round 2 of 2", 1)):
        with pytest.raises(KeyboardInterrupt):
            support.prune(folder, tmp_path / "out", "tyr", resume=True, progress=StopAt(place, at), **FEW)
        assert not (tmp_path / "out.partial" / "levels").exists()
    again = Notes()
    support.prune(folder, tmp_path / "out", "tyr", resume=True, progress=again, **FEW)
    # The first round is not searched again.
    assert [note for note in again.notes if "KL divergence" in note] == said[1:]
    first, second = (support.weights_of(tmp_path / name) for name in ("whole", "out"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert not list(tmp_path.glob("*.partial"))


def _numbers(note: str) -> list[str]:
    return note.split("KL divergence ")[1].split(" on ")[0].split(" -> ")


def test_it_may_begin_with_mask_gradients_and_move_weights_between_kinds(tiny_folder, tmp_path):
    given = {"allocation__rule": "search", "allocation__search_start": "mask_gradient", **FEW}
    folder = tiny_folder("llama", **SIZES)
    moved = support.prune(folder, tmp_path / "any", allocation__search_moves="any", **given)
    assert moved.sparsity == pytest.approx(0.3, abs=0.005)
    kept = support.prune(folder, tmp_path / "kind", **given)
    assert [record.shape for record in kept.layers] != [record.shape for record in moved.layers]


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "falcon"])
def test_families_with_norms_of_their_own_and_blocks_side_by_side(family, tmp_path):
    family_model(family, torch.float32).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    given = {"allocation__rule": "search", "ffn__ffn_multiple": 1, **FEW}
    result = support.prune(tmp_path / "dense", tmp_path / "out", **given)
    assert result.sparsity == pytest.approx(0.3, abs=0.05)
    assert torch.isfinite(support.load(tmp_path / "out")(torch.arange(20)[None]).logits).all()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"allocation.search_generations": 0}, "search_generations must be at least 1"),
        ({"allocation.search_rounds": 0}, "search_rounds must be at least 1"),
        ({"allocation.search_offspring": 0}, "search_offspring must be at least 1"),
        ({"allocation.search_levels": 1}, "search_levels must be at least 3"),
        ({"allocation.search_start": "random"}, "search_start"),
        ({"allocation.pca_ffn": False}, "does not read allocation.pca_ffn"),
        ({"allocation.budget_unit": "units"}, "does not read allocation.budget_unit"),
        ({"ffn.score": "taylor"}, "prunes each site before any gradient is measured"),
    ],
)
def test_what_cannot_be_searched_is_refused(flags, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(None, {"model": "m", "sparsity": 0.3, "method": "tyr", **flags})


def test_the_preset_is_the_rule_with_an_obs_pruner():
    assert TYR["allocation"]["rule"] == "search"
    assert (TYR["attention"]["score"], TYR["attention"]["heads"], TYR["ffn"]["score"]) == ("obs", "whole", "obs")
