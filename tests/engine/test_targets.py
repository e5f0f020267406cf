"""Pruning for a runtime: the shapes that it can run, through the real entry point."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import intraslice
from intraslice.checkpoint.pruned import open_pruned
from intraslice.errors import RecipeError
from support.progress import Notes, StopAt
from support.pruned import prune_family

FINE = {"attention.head_multiple": 2, "attention.context_multiple": 1, "ffn.ffn_multiple": 1}
SMALL = {"calibration.source": "builtin", "calibration.num_samples": 4, "calibration.seqlen": 32, **FINE}


def _prune(folder: Path, out: Path, target: str, sparsity: float = 0.3, **options):
    return intraslice.prune(str(folder), output=out, sparsity=sparsity, target=target, options={**SMALL, **options})


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("target", ["vllm", "llama.cpp", "stock"])
def test_every_layer_has_a_shape_that_the_target_runs(tiny_folder, tmp_path: Path, family: str, target: str):
    result = _prune(tiny_folder(family), tmp_path / "out", target)
    assert result.sparsity == pytest.approx(0.3, abs=0.005)
    shapes = [record.shape for record in result.layers]
    for shape in shapes:
        assert len(set(shape.heads_per_kv)) == 1
        assert shape.qk_head_dim == shape.v_head_dim
    if target in ("llama.cpp", "stock"):
        assert len({shape.qk_head_dim for shape in shapes}) == 1
        assert open_pruned(str(tmp_path / "out")).shared_pairs() is not None
    if target == "stock":
        assert len(set(shapes)) == 1
    model = intraslice.load(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


@pytest.mark.parametrize("target", ["llama.cpp", "stock"])
def test_a_family_that_the_target_lacks_is_refused(tiny_folder, tmp_path: Path, target: str):
    with pytest.raises(RecipeError, match=f"target {target} cannot run a pruned opt model"):
        _prune(tiny_folder("opt"), tmp_path / "out", target)


def test_one_shape_of_whole_heads_where_llama_cpp_knows_no_other(tmp_path: Path):
    more = {"attention.context_multiple": 2}
    prune_family("qwen3", tmp_path, "llama.cpp", sparsity=0.25, more=more, attention_bias=False)
    checkpoint = open_pruned(str(tmp_path / "pruned"))
    (shape,) = set(checkpoint.shapes)
    assert shape.qk_head_dim == shape.v_head_dim == checkpoint.dense_shape.qk_head_dim and not shape.headed_qk_norm
    with pytest.raises(RecipeError, match="llama.cpp runs qwen3 models with one shape"):
        prune_family("qwen3", tmp_path / "drop", "llama.cpp", more={"allocation.drop_blocks": True})
    with pytest.raises(RecipeError, match="architecture olmo2 are hidden_size / heads wide"):
        prune_family("olmo2", tmp_path / "olmo2", "llama.cpp")


def test_narrow_heads_share_their_rotary_pairs(tiny_folder, tmp_path: Path):
    # One kv head cannot go in a model that has one: only narrower heads can reach the target.
    folder = tiny_folder("llama", num_key_value_heads=1, num_attention_heads=2, head_dim=16, intermediate_size=16)
    _prune(folder, tmp_path / "out", "stock", 0.4, **{"attention.min_head_fraction": 0.5})
    checkpoint = open_pruned(str(tmp_path / "out"))
    assert checkpoint.shapes[0].qk_head_dim < 16
    pairs = checkpoint.shared_pairs()
    assert pairs is not None and len(pairs) == checkpoint.shapes[0].qk_head_dim // 2


def test_an_interrupted_run_keeps_its_plan(tiny_folder, tmp_path: Path):
    folder = tiny_folder("llama")
    whole = _prune(folder, tmp_path / "whole", "llama.cpp")
    options, asked = {**SMALL}, {"output": tmp_path / "again", "sparsity": 0.3, "target": "llama.cpp"}
    with pytest.raises(KeyboardInterrupt):
        intraslice.prune(str(folder), options=options, progress=StopAt("layers", 0), **asked)
    again = intraslice.prune(str(folder), options=options, resume=True, **asked)
    assert [record.shape for record in again.layers] == [record.shape for record in whole.layers]
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again"))
    assert first == second


def test_the_plan_says_what_the_constraint_costs(tiny_folder, tmp_path: Path):
    progress = Notes()
    intraslice.prune(
        str(tiny_folder("llama")),
        output=tmp_path / "out",
        sparsity=0.3,
        target="vllm",
        options=SMALL,
        progress=progress,
    )
    assert any("keeps" in note and "free shapes would keep" in note for note in progress.notes)


def test_shapes_need_mask_gradients(tiny_folder, tmp_path: Path):
    with pytest.raises(RecipeError, match="mask_gradient"):
        _prune(tiny_folder("llama"), tmp_path / "out", "stock", **{"allocation.rule": "uniform"})
    assert not (tmp_path / "out").exists()


def test_nothing_is_removed_at_sparsity_zero(tiny_folder, tmp_path: Path):
    folder = tiny_folder("llama")
    _prune(folder, tmp_path / "out", "stock", 0.0)
    tokens = torch.arange(20)[None]
    dense, same = (intraslice.load(path)(tokens).logits for path in (folder, tmp_path / "out"))
    torch.testing.assert_close(dense, same)
