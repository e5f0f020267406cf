"""Dense models whose layers are not alike: sizes of each layer, and layers that are not rotated."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from intraslice import api
from intraslice.checkpoint.pruned import open_pruned
from intraslice.checkpoint.reader import open_folder
from intraslice.errors import RecipeError, UnsupportedModelError
from intraslice.exporters.registry import EXPORTERS
from intraslice.methods.blockwise.heads import QKEdit, choose_qk
from intraslice.methods.blockwise.options import AllocationOptions, BlockwiseOptions
from intraslice.methods.blockwise.plan import _shape_grid
from intraslice.methods.blockwise.target_speed import choose_sparsity
from intraslice.methods.svd_llm.algebra import plan_ranks
from intraslice.placement import Placement
from intraslice.runtime.configuration_intraslice import (
    dense_config,
    dense_head_dim,
    dense_shape,
    dense_shapes,
    dense_sizes,
    pruned_config,
    rotary_dim,
    rotated,
)
from intraslice.runtime.families_intraslice import FAMILIES, LayerShape
from intraslice.runtime.modeling_intraslice import PrunedAttention
from intraslice.streaming.analysis import analyze_model
from intraslice.streaming.model import StreamedModel
from support.family_cases import family_config, family_model
from support.tiny import tiny_tokenizer

CPU = Placement(torch.device("cpu"), torch.float32, torch.float32, torch.float64)
FAST = {
    "calibration.source": "builtin",
    "calibration.num_samples": 4,
    "calibration.seqlen": 24,
    "run.device": "cpu",
    "run.dtype": "float32",
    "attention.head_multiple": 2,
    "ffn.ffn_multiple": 2,
}
OVERRIDES = {1: {"head_dim": 16, "num_key_value_heads": 1}, 2: {"intermediate_size": 24}}
LLAMA = FAMILIES["llama"]


def uneven_config() -> LlamaConfig:
    """Three layers of three sizes, as Gemma 4 has them in its config."""
    return LlamaConfig(
        vocab_size=272,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        head_dim=8,
        max_position_embeddings=64,
        per_layer_config=OVERRIDES,
    )


UNEVEN = (
    LayerShape(heads_per_kv=(2, 2), qk_head_dim=8, v_head_dim=8, intermediate_size=48),
    LayerShape(heads_per_kv=(4,), qk_head_dim=16, v_head_dim=16, intermediate_size=48),
    LayerShape(heads_per_kv=(2, 2), qk_head_dim=8, v_head_dim=8, intermediate_size=24),
)
SMALLER = [
    LayerShape(heads_per_kv=(2, 1), qk_head_dim=6, v_head_dim=5, intermediate_size=40),
    LayerShape(heads_per_kv=(3,), qk_head_dim=12, v_head_dim=16, intermediate_size=20),
    LayerShape(heads_per_kv=(1,), qk_head_dim=8, v_head_dim=8, intermediate_size=24),
]


def pruned_uneven():
    return pruned_config(uneven_config(), LLAMA, SMALLER, method="random", recipe={})


def test_dense_shapes_are_those_of_each_layer():
    config = uneven_config()
    assert dense_shapes(config, LLAMA) == UNEVEN
    assert [dense_head_dim(config, layer) for layer in range(3)] == [8, 16, 8]
    assert [rotary_dim(config, layer) for layer in range(3)] == [8, 16, 8]


def test_a_pruned_config_keeps_the_sizes_of_the_dense_layers(tmp_path):
    config = pruned_uneven()
    config.save_pretrained(tmp_path)
    for found in (config, AutoConfig.from_pretrained(tmp_path)):
        assert found.layer_shapes == tuple(SMALLER)
        # What caches and engines read is pruned, what the engine asks for is dense.
        assert [found.per_layer_config[layer].head_dim for layer in range(3)] == [6, 16, 8]
        assert dense_shapes(found, LLAMA) == UNEVEN
        before = found.to_dict()
        with dense_sizes(found):
            assert [found.per_layer_config[layer].head_dim for layer in range(3)] == [8, 16, 8]
            assert found.per_layer_config[2].intermediate_size == 24
        assert found.to_dict() == before
        dense = dense_config(found)
        assert type(dense) is LlamaConfig and dense_shapes(dense, LLAMA) == UNEVEN
        assert dense.to_dict()["per_layer_config"] == uneven_config().to_dict()["per_layer_config"]


def test_a_config_without_sizes_per_layer_records_none():
    dense = family_config("llama")
    config = pruned_config(dense, LLAMA, [dense_shape(dense, LLAMA)] * 4, method="random", recipe={})
    assert "dense" not in config.intraslice
    assert not dense_config(config).is_heterogeneous


def test_attention_takes_the_head_of_its_own_layer():
    stock = LlamaConfig(**{**family_config("llama").to_dict(), "attention_bias": False})
    source = AutoModelForCausalLM.from_config(stock).model.layers[0].self_attn
    wide = dataclasses.replace(UNEVEN[1], qk_head_dim=12)
    module = PrunedAttention(pruned_uneven(), 1, LLAMA, wide, source)
    assert module.selects_pairs and module.rotary_half == 8
    with pytest.raises(ValueError, match="exceeds 8"):
        PrunedAttention(pruned_uneven(), 0, LLAMA, wide, source)


def test_ranks_follow_the_sizes_of_each_layer():
    small, large = {"q": (32, 64)}, {"q": (128, 256)}
    (first, second) = plan_ranks([small, large], 0.5)
    assert dict(second)["q"] > 2 * dict(first)["q"]


def test_a_speedup_needs_layers_that_are_alike():
    with pytest.raises(RecipeError, match="give --sparsity"):
        choose_sparsity(uneven_config(), LLAMA, BlockwiseOptions(), speedup=1.5, speedup_of="decode", placement=CPU)


@pytest.mark.parametrize("freedom", ["layer", "width", "model"])
def test_one_grid_of_shapes_needs_layers_that_are_alike(freedom):
    options = BlockwiseOptions(allocation=AllocationOptions(shape_freedom=freedom))
    # No stock class of today has such layers, so there is no model to open.
    model: Any = SimpleNamespace(dense_shapes=UNEVEN)
    with pytest.raises(RecipeError, match=f"shape_freedom = {freedom} was asked .* layers of this .* different sizes"):
        _shape_grid(model, options)


@pytest.mark.parametrize("to", EXPORTERS)
def test_no_export_has_a_place_for_layers_of_different_sizes(to, tmp_path):
    pruned_uneven().save_pretrained(tmp_path / "pruned")
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "pruned" / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="layers have different sizes, .* load it with transformers"):
        api.export(tmp_path / "pruned", to=to, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def smollm3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm3")
    family_model("smollm3", torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_layers_are_rotated_as_the_config_says(smollm3):
    spec, config = FAMILIES["smollm3"], family_config("smollm3")
    assert [rotated(config, spec, layer) for layer in range(4)] == [True, False, True, False]
    assert all(rotated(uneven_config(), LLAMA, layer) for layer in range(3))
    assert not rotated(family_config("opt"), FAMILIES["opt"], 0)
    streamed = StreamedModel(open_folder(smollm3), CPU, (1, 8))
    assert [streamed.pairs_to_channels(layer) is None for layer in range(4)] == [False, True, False, True]
    assert [streamed.load_layer(layer).attention.rotated for layer in range(4)] == [True, False, True, False]


def test_only_rotated_layers_keep_rotary_pairs(smollm3, tmp_path):
    """Every head keeps fewer channels: pairs where it is rotated, free directions where it is not."""
    options = {**FAST, "attention.heads": "all", "allocation.rule": "uniform"}
    api.prune(str(smollm3), output=tmp_path / "out", sparsity=0.5, options=options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    widths = [shape.qk_head_dim for shape in model.config.layer_shapes]
    assert all(width < 8 for width in widths)
    attentions = [layer.self_attn for layer in model.model.layers]
    assert [attention.rope_index is None for attention in attentions] == [False, True, False, True]
    report = api.export(tmp_path / "out", to="padded", output=tmp_path / "padded")
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-3


def test_pairs_that_all_heads_share_are_those_of_rotated_layers(smollm3, tmp_path):
    api.prune(str(smollm3), output=tmp_path / "out", sparsity=0.4, target="stock", options=FAST)
    checkpoint = open_pruned(str(tmp_path / "out"))
    assert checkpoint.rotated == (True, False, True, False)
    assert checkpoint.shared_pairs() is not None
    assert [checkpoint.pair_channels(layer) is None for layer in range(4)] == [False, True, False, True]
    report = api.export(tmp_path / "out", to="stock", output=tmp_path / "stock")
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-3


def test_shared_pairs_say_nothing_about_a_layer_without_them(smollm3):
    from intraslice.layers.decoder import read_attention
    from intraslice.methods.blockwise.measure import attention_stats
    from intraslice.streaming.hidden import HiddenStates

    streamed = StreamedModel(open_folder(smollm3), CPU, (2, 12))
    tokens = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    hidden = HiddenStates((2, 12, 32), torch.float32, 2, CPU.device)
    hidden.write(slice(0, 2), streamed.embed(tokens))
    options = dataclasses.replace(BlockwiseOptions().attention, heads="all", head_multiple=2)
    edits: list[QKEdit] = []
    for index in range(2):
        layer = streamed.load_layer(index)
        stats = attention_stats(streamed, layer, hidden, False)
        weights, pairs = read_attention(layer, streamed.dense_shapes[index]), streamed.pairs_to_channels(index)
        edits.append(choose_qk(weights, stats, 2000.0, options, pairs, None, (1, 2)))
    assert edits[0].rope_pairs is not None and edits[0].query_basis is None
    assert edits[1].rope_pairs is None and edits[1].query_basis is not None


def test_the_analysis_has_pair_errors_of_rotated_layers_only(smollm3):
    tokens = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    found = analyze_model(open_folder(smollm3), tokens, kept_fractions=(1.0, 0.5), device="cpu")["rope_pairs"]
    assert [row[1] is None for row in found["relative_error"]] == [False, True, False, True]
