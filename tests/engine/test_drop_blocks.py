"""Pruning that takes whole blocks: which ones, what is left of the budget, and the checkpoint that is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from intraslice.checkpoint.pruned import open_pruned
from intraslice.errors import RecipeError, UnsupportedModelError
from intraslice.exporters.options import ExportOptions
from intraslice.exporters.padded import export_padded
from intraslice.exporters.stock import export_stock
from intraslice.inspection import inspect_model
from intraslice.layers.sites import ATTENTION, FFN, ModelSites, layer_sites
from intraslice.methods.blockwise.allocators.drop import choose_dropped
from intraslice.methods.blockwise.allocators.mask_gradient import MaskGradients, SiteGradients
from intraslice.methods.blockwise.options import AllocationOptions
from intraslice.progress import SilentProgress
from intraslice.recipes.recipe import load_recipe
from intraslice.results.result import PruneResult
from intraslice.runtime.configuration_intraslice import dense_shape
from intraslice.runtime.families_intraslice import FAMILIES
from support.family_cases import family_model
from support.progress import Notes, StopAt
from support.prune import calibration, load, logits, prune, weights_of
from support.tiny import tiny_config, tiny_tokenizer

DROP = {"allocation__drop_blocks": True, "allocation__max_dropped_share": 0.5, "allocation__max_drop_price": 3.0}
TEXT = calibration(seed=5).tokens[:2]


def dropped(result: PruneResult) -> set[tuple[int, str]]:
    return {(record.layer, name) for record in result.layers for name in record.shape.dropped}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {}), ("phi3", {}), ("opt", {}), ("opt", {"do_layer_norm_before": False})],
    ids=["llama", "phi3", "opt", "opt-norm-after"],
)
def test_what_is_streamed_is_what_is_loaded(family, overrides, tiny_folder, tmp_path: Path, monkeypatch):
    from intraslice.streaming import hidden

    last: list[torch.Tensor] = []
    release = hidden.HiddenStates.release

    def keep(states: Any) -> None:
        # The streams are freed after the layers: what the last layer gave is in them.
        last.append(torch.cat([states.read(part).clone() for part in states.slices()]))
        release(states)

    folder = tiny_folder(family, num_hidden_layers=4, **overrides)
    monkeypatch.setattr(hidden.HiddenStates, "release", keep)
    result = prune(folder, tmp_path / "out", sparsity=0.5, **DROP)
    gone = dropped(result)
    assert {name for _, name in gone} and len(gone) <= 4
    assert abs(result.sparsity - 0.5) <= 0.005
    for record in result.layers:
        assert all(
            record.errors[name] == (1.0 if name in record.shape.dropped else record.errors[name])
            for name in (ATTENTION, FFN)
        )
    model = load(tmp_path / "out")
    layers = model.get_submodule(FAMILIES[family].layers)
    seen: list[torch.Tensor] = []
    layers[-1].register_forward_hook(
        lambda module, given, output: seen.append(output if torch.is_tensor(output) else output[0])
    )
    with torch.no_grad():
        model(calibration().tokens)
    streamed = [states for states in last if states.shape == seen[0].shape]
    assert any(torch.allclose(states, seen[0], rtol=1e-4, atol=1e-5) for states in streamed)
    info = inspect_model(str(tmp_path / "out"))
    assert info.layer_parameters == result.pruned_layer_parameters
    assert info.num_parameters == result.pruned_parameters


def test_a_resumed_run_gives_the_same(tiny_folder, tmp_path: Path):
    folder = tiny_folder("llama", num_hidden_layers=4)
    whole = prune(folder, tmp_path / "whole", sparsity=0.5, **DROP)
    assert dropped(whole)
    with pytest.raises(KeyboardInterrupt):
        prune(folder, tmp_path / "out", sparsity=0.5, progress=StopAt("layers", 2), **DROP)
    resumed = prune(folder, tmp_path / "out", sparsity=0.5, resume=True, **DROP)
    assert [record.shape for record in resumed.layers] == [record.shape for record in whole.layers]
    first, second = weights_of(tmp_path / "whole"), weights_of(tmp_path / "out")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("target", ["llama.cpp", "vllm"])
def test_shapes_of_a_runtime_with_dropped_blocks(target, tiny_folder, tmp_path: Path):
    folder = tiny_folder("llama", num_hidden_layers=4)
    options = {**DROP, "target": target, "attention__context_multiple": 1}
    result = prune(folder, tmp_path / "out", sparsity=0.5, **options)
    assert dropped(result) and abs(result.sparsity - 0.5) <= 0.005
    shapes = [record.shape for record in result.layers if record.shape.has_attention]
    if target == "vllm":
        assert all(len(set(shape.heads_per_kv)) == 1 for shape in shapes)
        load(tmp_path / "out").config.check_vllm(1)
    else:
        assert len({shape.qk_head_dim for shape in shapes}) == 1


def test_off_and_nothing_to_drop_are_the_same(tiny_folder, tmp_path: Path):
    folder, notes = tiny_folder("llama"), Notes()
    prune(folder, tmp_path / "off", sparsity=0.3)
    on = prune(folder, tmp_path / "on", sparsity=0.3, progress=notes, **{**DROP, "allocation__max_drop_price": 1e-9})
    assert not dropped(on) and "0 of 6 blocks go" in notes.notes[0] and "thinning is better" in notes.notes[0]
    first, second = weights_of(tmp_path / "off"), weights_of(tmp_path / "on")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_padded_holds_them_and_stock_says_why_not(tiny_folder, tmp_path: Path):
    for family, overrides in (("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {}), ("opt", {})):
        folder, out = tiny_folder(family, num_hidden_layers=4, **overrides), tmp_path / family
        assert dropped(prune(folder, out, sparsity=0.5, **DROP))
        checkpoint, padded = open_pruned(str(out)), tmp_path / f"{family}-padded"
        for pad_to in ("dense", "max"):
            options = ExportOptions(pad_to=pad_to, overwrite=True)
            report = export_padded(checkpoint, padded, options, SilentProgress())
            assert report.max_logit_difference is not None and report.max_logit_difference < 1e-4
            assert (logits(padded, TEXT) - logits(out, TEXT)).abs().max() < 1e-4
        with pytest.raises(UnsupportedModelError, match="has no .*, which every stock layer has; .*--to padded"):
            export_stock(checkpoint, tmp_path / "stock", ExportOptions(), SilentProgress())


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "granite"])
def test_families_with_more_norms_and_factors(family, tmp_path: Path):
    family_model(family, torch.float32).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    result = prune(tmp_path / "dense", tmp_path / "out", sparsity=0.5, **DROP)
    assert dropped(result) and abs(result.sparsity - 0.5) <= 0.005
    options = ExportOptions(pad_to="dense")
    report = export_padded(open_pruned(str(tmp_path / "out")), tmp_path / "padded", options, SilentProgress())
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-3


def test_blocks_side_by_side_are_refused(tmp_path: Path):
    family_model("cohere", torch.float32).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(RecipeError, match="attention and FFN of a cohere layer run side by side"):
        prune(tmp_path / "dense", tmp_path / "out", **DROP)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"target": "stock"}, "--target stock cannot run"),
        ({"allocation.budget_unit": "units"}, "budget_unit = units does not count"),
        ({"method": "flap"}, "does not read allocation.drop_blocks"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, expected):
    with pytest.raises(RecipeError, match=expected):
        load_recipe(None, {"model": "m", "sparsity": 0.3, "allocation.drop_blocks": True, **flags})


def test_caps_without_the_option_have_no_effect():
    with pytest.raises(RecipeError, match="does not read allocation.max_dropped_share"):
        load_recipe(None, {"model": "m", "sparsity": 0.3, "allocation.max_dropped_share": 0.2})


class TestChoice:
    """Four layers whose blocks have the importance that is asked for, spread evenly over their channels."""

    @staticmethod
    def measured(worth: dict[tuple[int, str], float]) -> tuple[MaskGradients, ModelSites]:
        config = tiny_config("llama", num_hidden_layers=4)
        spec = FAMILIES["llama"]
        sites = ModelSites((layer_sites(spec, dense_shape(config, spec), 32),) * 4)
        layers = []
        for layer in range(4):
            found = {}
            for site, (channels, blocks) in zip(sites.layers[layer], ((32, 4), (64, 8)), strict=True):
                # A wave over the channels: signs cancel, squares do not.
                sign = torch.ones(1, channels).cumsum(1).remainder(2) * 2 - 1
                grad = sign * worth.get((layer, site.name), 1.0) * (1 + 0.01 * torch.arange(channels) + layer / 100)
                moment = torch.eye(channels // blocks).expand(blocks, -1, -1)
                found[site.name] = SiteGradients(grad.double(), moment.double())
            layers.append(found)
        return MaskGradients(tuple(layers)), sites

    def choose(
        self, worth: dict[tuple[int, str], float], share: float = 0.5, price: float = 1.0, sparsity: float = 0.5
    ):
        options = AllocationOptions(
            drop_blocks=True, max_dropped_share=share, max_drop_price=price, pca_attention=False, pca_ffn=False
        )
        return choose_dropped(*self.measured(worth), sparsity, options)

    def test_the_cheapest_go_first_and_the_cap_holds(self):
        worth = {(1, ATTENTION): 0.02, (2, FFN): 0.01, (0, ATTENTION): 0.03}
        assert self.choose(worth, price=10)[:3] == ((2, FFN), (1, ATTENTION), (0, ATTENTION))
        assert self.choose(worth, price=10, share=0.25) == ((2, FFN), (1, ATTENTION))

    def test_where_thinning_is_better_nothing_goes(self):
        assert self.choose({}, price=0.5) == ()

    def test_blocks_beyond_the_sparsity_stay(self):
        # An attention is a twelfth of all weights, an FFN a sixth.
        worth = {(2, FFN): 0.01, (1, ATTENTION): 0.02}
        assert self.choose(worth, price=10, sparsity=0.1) == ((1, ATTENTION),)

    def test_signs_that_cancel_do_not_make_a_block_worthless(self):
        measured, _ = self.measured({(1, FFN): 5.0})
        gradient = measured.layers[1][FFN].grad
        assert gradient.sum().square() < 0.01 * gradient.square().sum()
        assert (1, FFN) not in self.choose({(1, FFN): 5.0}, share=0.9)

    def test_an_ffn_stays_behind_the_last_attention(self):
        cheap = dict.fromkeys(((layer, FFN) for layer in range(4)), 0.01)
        gone = self.choose({**cheap, (0, ATTENTION): 50.0}, share=0.9, price=1e9, sparsity=0.9)
        left = [set(range(4)) - {layer for layer, name in gone if name == kind} for kind in (ATTENTION, FFN)]
        assert all(left) and max(left[1]) >= max(left[0])
