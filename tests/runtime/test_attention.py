"""The attention of pruned models against the stock classes of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from intraslice.runtime.configuration_intraslice import CACHE_ARGUMENT, dense_shape
from intraslice.runtime.families_intraslice import FAMILIES, LayerShape
from intraslice.runtime.modeling_intraslice import PrunedAttention, apply_layer_shape, pair_channels
from support.tiny_models import CASES, dense_model, pruned_model, tokens
from support.tolerances import EAGER, FLOAT32, FLOAT64
from support.twin import zero_pad


def at_dense_shape(model):
    """The same weights with our attention."""
    view = copy.deepcopy(model)
    spec = FAMILIES[view.config.model_type]
    for layer_idx, layer in enumerate(view.get_submodule(spec.layers)):
        apply_layer_shape(layer, view.config, spec, layer_idx, dense_shape(view.config, spec))
    assert any(isinstance(module, PrunedAttention) for module in view.modules())
    return view


def left_padding(ids, attention):
    mask = torch.ones_like(ids)
    # Rows without any visible token are NaN in float64 eager attention of transformers, and spread.
    mask[0, :3] = 1 if attention == "eager" else 0
    return mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_dense_shape_equals_stock_class(case, attention):
    model = dense_model(case, attention=attention)
    view = at_dense_shape(model)
    assert view.state_dict().keys() == model.state_dict().keys()
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(view(ids).logits, model(ids).logits, **FLOAT64)
        mask = left_padding(ids, attention)
        expected, actual = (m(ids, attention_mask=mask).logits[mask == 1] for m in (model, view))
        torch.testing.assert_close(actual, expected, **FLOAT64)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_pruned_model_equals_zero_padded_twin_in_stock_class(case, attention):
    model = pruned_model(case, attention=attention)
    ids = tokens()
    with torch.no_grad():
        tolerance = EAGER if attention == "eager" else FLOAT64
        torch.testing.assert_close(model(ids).logits, zero_pad(model)(ids).logits, **tolerance)
        model.float()
        torch.testing.assert_close(model(ids).logits, zero_pad(model)(ids).logits, **FLOAT32)


@pytest.mark.parametrize("build", [pruned_model, lambda *args: at_dense_shape(dense_model(*args))])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "llama-dynamic-rope"])
def test_cached_decode_equals_full_forward(case, attention, build):
    # Dynamic RoPE changes its angles as the sequence grows: caching is not exact there in any implementation.
    model = build(case, torch.float64, attention)
    ids = tokens()
    mask = left_padding(ids, attention)
    with torch.no_grad():
        full = model(ids, attention_mask=mask).logits
        cache, steps = None, []
        for start, stop in [(0, 6), (6, 9), *((i, i + 1) for i in range(9, 13))]:
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], **{CACHE_ARGUMENT: cache}, use_cache=True)
            cache = out[CACHE_ARGUMENT]
            steps.append(out.logits)
    tolerance = EAGER if attention == "eager" else FLOAT64
    torch.testing.assert_close(torch.cat(steps, 1)[mask == 1], full[mask == 1], **tolerance)


def test_cache_holds_only_what_is_kept():
    model = pruned_model("llama-gqa-biases")
    cache = model(tokens(), use_cache=True)[CACHE_ARGUMENT]
    for layer, shape in zip(cache.layers, model.config.layer_shapes, strict=True):
        assert layer.keys.shape == (2, shape.num_key_value_heads, 13, shape.qk_head_dim)
        assert layer.values.shape == (2, shape.num_key_value_heads, 13, shape.v_head_dim)


def test_project_and_attend_are_the_forward():
    model = pruned_model("qwen2-gqa")
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    position_embeddings = model.model.rotary_emb(hidden, torch.arange(5)[None])
    query, key, value = attention.project(hidden, position_embeddings)
    shape = attention.shape
    assert query.shape == (2, shape.num_attention_heads, 5, shape.qk_head_dim)
    assert key.shape == (2, shape.num_key_value_heads, 5, shape.qk_head_dim)
    assert value.shape == (2, shape.num_key_value_heads, 5, shape.v_head_dim)
    context, _ = attention.attend(query, key, value)
    assert context.shape == (2, 5, shape.num_attention_heads * shape.v_head_dim)
    out, _ = attention(hidden, position_embeddings)
    torch.testing.assert_close(attention.o_proj(context), out, atol=0, rtol=0)


@pytest.mark.parametrize(("rotated", "width"), [(8, 8), (4, 8), (6, 8), (2, 12)])
def test_pair_channels_cover_the_head_once(rotated, width):
    pairs = pair_channels(rotated, width)
    assert pairs.shape == (width // 2, 2)
    assert sorted(pairs.flatten().tolist()) == list(range(width))
    half = rotated // 2
    assert pairs[:half].tolist() == [[i, i + half] for i in range(half)]
    assert (pairs[half:] >= rotated).all()


def test_pair_channels_refuses_odd_widths():
    with pytest.raises(ValueError, match="must be even"):
        pair_channels(3, 8)


def test_odd_or_too_wide_query_heads_are_refused():
    model = dense_model("llama-mha")
    for width in (5, 10):
        shape = LayerShape(heads_per_kv=(1,), qk_head_dim=width, v_head_dim=4, intermediate_size=8)
        with pytest.raises(ValueError, match="is not even or exceeds 8"):
            PrunedAttention(model.config, 0, FAMILIES["llama"], shape, model.model.layers[0].self_attn)


def test_rope_pairs_of_another_layer_are_refused():
    attention = pruned_model("llama-mha").model.layers[0].self_attn
    with pytest.raises(ValueError, match="rotary pairs"):
        attention.set_rope_pairs(torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("case", ["llama-gqa-biases", "phi3-mha", "opt"])
def test_apply_layer_shape_keeps_device_dtype_and_unchanged_weights(case):
    model = dense_model(case, torch.bfloat16)
    spec = FAMILIES[model.config.model_type]
    layer = model.get_submodule(spec.layers)[1]
    dense = dense_shape(model.config, spec)
    out_weight = layer.get_submodule(spec.attention).get_submodule(spec.o.path).weight
    down = (layer.get_submodule(spec.mlp) if spec.mlp else layer).get_submodule(spec.down.path)
    shape = LayerShape(
        heads_per_kv=dense.heads_per_kv,
        qk_head_dim=4,
        v_head_dim=dense.v_head_dim,
        intermediate_size=dense.intermediate_size,
    )
    apply_layer_shape(layer, model.config, spec, 1, shape)
    attention = layer.get_submodule(spec.attention)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert attention.get_submodule(spec.o.path).weight is out_weight
    assert (layer.get_submodule(spec.mlp) if spec.mlp else layer).get_submodule(spec.down.path) is down
    assert not attention.training
    if spec.rope:
        assert attention.rope_index.tolist() == [[0, 1]] * dense.num_key_value_heads
    again = LayerShape(**{**shape.to_dict(), "heads_per_kv": shape.heads_per_kv, "intermediate_size": 5})
    apply_layer_shape(layer, model.config, spec, 1, again)
    assert layer.get_submodule(spec.attention) is attention, "only the FFN changed"


def test_apply_layer_shape_on_the_meta_device():
    with torch.device("meta"):
        model = dense_model("llama-gqa-biases")
    layer = model.model.layers[0]
    shape = LayerShape(heads_per_kv=(2, 1), qk_head_dim=4, v_head_dim=3, intermediate_size=5)
    apply_layer_shape(layer, model.config, FAMILIES["llama"], 0, shape)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes["self_attn.q_proj.weight"] == (12, 32)
    assert shapes["self_attn.v_proj.weight"] == (6, 32)
    assert shapes["self_attn.o_proj.weight"] == (32, 9)
    assert shapes["self_attn.rope_index"] == (2, 2)
    assert shapes["mlp.down_proj.weight"] == (32, 5)


def test_linears_of_a_new_shape_belong_to_the_layer_only():
    model = dense_model("llama-mha")
    before = {id(parameter) for parameter in model.parameters()}
    layer = model.model.layers[0]
    shape = LayerShape(heads_per_kv=(1, 1), qk_head_dim=4, v_head_dim=4, intermediate_size=5)
    apply_layer_shape(layer, model.config, FAMILIES["llama"], 0, shape)
    attention = layer.self_attn
    assert isinstance(attention.q_proj, nn.Linear)
    assert not {id(parameter) for parameter in attention.parameters()} & before
