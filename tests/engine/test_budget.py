"""The budget of whole runs: refused before anything is changed, accounted for exactly, and missed only with a word."""

from __future__ import annotations

import json

import pytest

from intraslice.errors import BudgetError
from intraslice.methods.blockwise import method as blockwise
from intraslice.methods.blockwise.allocators.base import Allocation
from support.progress import Notes, StopAt
from support.prune import BLOCKWISE, prune

# In a tiny model eight channels are 2.8 percent of all weights.
COARSE = {"ffn__ffn_multiple": 8}


@pytest.mark.parametrize(
    "options",
    [{"allocation__rule": "uniform"}, {}],
    ids=["uniform", "gradients"],
)
def test_impossible_widths_are_refused_before_the_first_layer(options, tiny_folder, tmp_path, monkeypatch):
    touched = []
    monkeypatch.setattr(blockwise, "prune_layer", lambda *args: touched.append(args))
    monkeypatch.setattr(blockwise.Blockwise, "open", lambda *args: touched.append(args))
    with pytest.raises(BudgetError, match="ffn.ffn_multiple = 64 the possible widths reach only"):
        prune(tiny_folder("llama"), tmp_path / "out", sparsity=0.5, ffn__ffn_multiple=64, **options)
    assert touched == []
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("layers"))
    kept = [path.name for path in tmp_path.rglob("*.safetensors")]
    # A gradient pass is worth keeping: another multiple can use it.
    assert kept == ([] if options.get("allocation__rule") == "uniform" else ["gradients.safetensors"])


@pytest.mark.parametrize("sparsity", [0.2, 0.3, 0.35, 0.45])
def test_steps_that_are_too_coarse_end_with_a_note(sparsity, tiny_folder, tmp_path):
    progress = Notes()
    folder = tiny_folder("llama")
    result = prune(folder, tmp_path / "out", sparsity=sparsity, progress=progress, allocation__rule="uniform", **COARSE)
    half = 8 * 3 * 32 / 2 / result.dense_layer_parameters
    missed = abs(result.sparsity - sparsity)
    assert 0.005 < missed <= half
    (note,) = progress.notes
    assert note.startswith(f"sparsity {result.sparsity:.4f} is reached instead of {sparsity:g}")
    assert "ffn.ffn_multiple = 8" in note


def test_a_budget_that_is_met_needs_no_note(tiny_folder, tmp_path):
    progress = Notes()
    prune(
        tiny_folder("llama"), tmp_path / "out", sparsity=0.25, progress=progress, allocation__rule="uniform", **COARSE
    )
    assert progress.notes == []


@pytest.mark.parametrize("method", BLOCKWISE)
def test_what_is_carried_on_is_what_was_planned_less_what_was_kept(method, tiny_folder, tmp_path):
    folder = tiny_folder("llama", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4)
    for stop in (0, 2):
        out = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            prune(folder, out, method, sparsity=0.35, progress=StopAt("layers", stop), **COARSE)
        manifest = json.loads((tmp_path / f"{stop}.partial" / "manifest.json").read_text())["state"]
        assert len(manifest["records"]) == stop + 1
        keep = Allocation.from_dict(manifest["plan"]).keep
        dense = {"attention": 2 * 32 * 4 * (8 + 4), "ffn": 3 * 32 * 64}
        planned = sum(keep[layer][name] * dense[name] for layer in range(stop + 1) for name in dense)
        kept = sum(record["num_parameters"] for record in manifest["records"])
        assert manifest["carry"] == pytest.approx(planned - kept, abs=1e-6)
