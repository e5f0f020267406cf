"""Layers without attention or FFN: they add exactly nothing, and every cache counts as before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from intraslice.layers.state_dict import as_linears, below
from intraslice.runtime.configuration_intraslice import CACHE_ARGUMENT, dense_shapes, family_of, pruned_config
from intraslice.runtime.families_intraslice import FAMILIES, LayerShape
from intraslice.speed.worker import _cache_bytes
from support.family_cases import KNOWN_CASES, doubles, family_config, family_model, spec_of
from support.tiny_models import CASES, dense_config_of, randomise, tokens

ATTENTION, FFN = "attention", "ffn"
GONE: dict[str, Mapping[int, Sequence[str]]] = {
    "first attention": {0: [ATTENTION]},
    "first layer": {0: [ATTENTION, FFN], 1: [FFN]},
    "both kinds": {0: [FFN], 1: [ATTENTION]},
    "last attentions": {1: [FFN, ATTENTION], 2: [ATTENTION]},
}
# Angles that change with the length of the text are those of the longest text so far, with a cache or without.
CACHED = [case for case in CASES if case != "llama-dynamic-rope"]
WINDOWS = ("mistral-gqa-window", "qwen2-mha-some-windows", "phi3-gqa-partial-rope")


def shapes_without(dense: Any, gone: Mapping[int, Sequence[str]]) -> list[LayerShape]:
    shapes = list(dense_shapes(dense, family_of(dense)))
    for layer, names in gone.items():
        for name in names:
            shapes[layer] = shapes[layer].without(name)
    return shapes


def dropped_model(case: str, gone: Mapping[int, Sequence[str]]) -> Any:
    dense = dense_config_of(case)
    spec = FAMILIES[dense.model_type]
    config = pruned_config(dense, spec, shapes_without(dense, gone), method="random", recipe={})
    model = AutoModelForCausalLM.from_config(config).double().eval()
    randomise(model)
    return model


@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_dense_model_with_silent_blocks_computes_the_same(case: str, gone: str) -> None:
    model = dropped_model(case, GONE[gone])
    dense = dense_config_of(case)
    spec = FAMILIES[dense.model_type]
    twin = AutoModelForCausalLM.from_config(dense).double().eval()
    weights = {**twin.state_dict(), **model.state_dict()}
    assert weights.keys() == twin.state_dict().keys() > model.state_dict().keys()
    for layer, names in GONE[gone].items():
        for _, output in (spec.attention_paths if name == ATTENTION else spec.ffn_paths for name in names):
            for kind in ("weight", "bias"):
                if (name := f"{spec.layers}.{layer}.{output}.{kind}") in weights:
                    weights[name] = torch.zeros_like(weights[name])
    twin.load_state_dict(weights)
    assert (model(tokens()).logits - twin(tokens()).logits).abs().max() <= 1e-10


@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("case", CACHED)
@torch.no_grad()
def test_token_by_token_computes_the_same(case: str, gone: str) -> None:
    model, text = dropped_model(case, GONE[gone]), tokens()
    whole = model(text).logits
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)]
    # A cache that knows no windows keeps everything, which their masks are not made for.
    caches += [] if case in WINDOWS else [DynamicCache()]
    for cache in caches:
        steps = [text[:, :7], *text[:, 7:].split(1, dim=1)]
        found = [model(step, **{CACHE_ARGUMENT: cache}, use_cache=True).logits for step in steps]
        assert (torch.cat(found, dim=1) - whole).abs().max() <= 1e-10


@pytest.mark.parametrize("case", KNOWN_CASES)
@torch.no_grad()
def test_every_family_can_lose_its_blocks(case: str) -> None:
    """Norms of inputs and outputs, factors, windows and parallel blocks: what is gone adds nothing in any of them."""
    dense, gone = family_model(case), {0: [ATTENTION], 1: [FFN], 3: [ATTENTION, FFN]}
    spec, config = spec_of(case), family_config(case)
    config = pruned_config(config, spec, shapes_without(config, gone), method="random", recipe={})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    weights = dense.state_dict()
    for index in range(config.num_hidden_layers):
        # Matrices that the stock class stores transposed are Linears.
        prefix = f"{spec.layers}.{index}."
        layer = as_linears(below(weights, prefix.removesuffix(".")), spec)
        weights |= {f"{prefix}{name}": tensor for name, tensor in layer.items()}
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    for layer, names in gone.items():
        for name in names:
            _, output = spec.attention_paths if name == ATTENTION else spec.ffn_paths
            silent = dense.get_submodule(f"{spec.layers}.{layer}.{output}")
            silent.weight.zero_()
            if silent.bias is not None:
                silent.bias.zero_()
    text = tokens()
    # Norms and softmax of stock classes compute in float32 unless told otherwise.
    with doubles():
        whole = model(text).logits
        assert (whole - dense(text).logits).abs().max() <= 1e-10
        cache = DynamicCache(config=model.config)
        steps = [text[:, :7], *text[:, 7:].split(1, dim=1)]
        found = [model(step, **{CACHE_ARGUMENT: cache}, use_cache=True).logits for step in steps]
        assert (torch.cat(found, dim=1) - whole).abs().max() <= 1e-10


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("case", ["llama-gqa-biases", "mistral-gqa-window", "opt"])
def test_generation_with_a_cache_is_that_without(case: str, gone: str, options: dict[str, Any]) -> None:
    model = dropped_model(case, GONE[gone])
    settings = {"max_new_tokens": 8, "do_sample": False}
    found = model.generate(tokens(), **settings, **options)
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    assert torch.equal(found, model.generate(tokens(), **settings, **beams, use_cache=False))


@torch.no_grad()
def test_a_dropped_block_has_no_weights_and_hardly_a_cache() -> None:
    model = dropped_model("llama-mha", {0: [ATTENTION], 1: [ATTENTION, FFN]})
    names = [name for name in model.state_dict() if name.startswith("model.layers.")]
    assert not [name for name in names if name.startswith("model.layers.1.")]
    assert not [name for name in names if name.startswith(("model.layers.0.self_attn", "model.layers.0.input"))]
    cache = DynamicCache(config=model.config)
    model(tokens(2, 13), **{CACHE_ARGUMENT: cache}, use_cache=True)
    # One channel for the keys and one for the values of layer 0, nothing in layer 1, 4 heads of 8 in layer 2.
    assert _cache_bytes(cache, 2) == ((2 + 2 * 32) * 8, (2 + 2 * 32) * 8 * 13 * 2)


def test_a_saved_model_loads_again(tmp_path: Path) -> None:
    model = dropped_model("llama-gqa-biases", GONE["first layer"]).float()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.layer_shapes == model.config.layer_shapes
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_only_layers_that_lost_a_block_say_so() -> None:
    whole = LayerShape(heads_per_kv=(2, 2), qk_head_dim=8, v_head_dim=8, intermediate_size=48)
    assert "dropped" not in whole.to_dict()
    for shape in (whole.without(FFN), whole.without(ATTENTION), whole.without(ATTENTION).without(FFN)):
        assert LayerShape.from_dict(shape.to_dict()) == shape
        spec = FAMILIES["llama"]
        kept = {name: 32 * 8 * (4 + 2) * 2 for name in (ATTENTION,) if shape.has_attention}
        kept |= {name: 3 * 32 * 48 for name in (FFN,) if shape.has_ffn}
        assert spec.num_parameters(shape, 32) == sum(kept.values())
        assert len(spec.linear_sizes(shape, 32)) == 4 * shape.has_attention + 3 * shape.has_ffn
