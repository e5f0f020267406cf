"""Layers whose output projections have biases that their family does not know."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from intraslice.runtime.configuration_intraslice import pruned_config
from intraslice.runtime.families_intraslice import FAMILIES, LayerShape
from intraslice.runtime.modeling_intraslice import apply_layer_shape
from support.tiny_models import ONE_PER_FAMILY, dense_config_of, pruned_model, ragged_shapes, randomise, tokens
from support.tolerances import FLOAT64


def output_projections(model: Any, index: int) -> tuple[Any, Any]:
    spec = FAMILIES[model.config.family]
    layer = model.get_submodule(spec.layers)[index]
    mlp = layer.get_submodule(spec.mlp) if spec.mlp else layer
    return layer.get_submodule(spec.attention).get_submodule(spec.o.path), mlp.get_submodule(spec.down.path)


def with_biases(case: str) -> Any:
    """The second of three layers has output biases; the other weights are those of `pruned_model`."""
    plain = pruned_model(case)
    dense = dense_config_of(case)
    first, second, third = ragged_shapes(dense)
    shapes = [first, replace(second, output_bias=True), third]
    config = pruned_config(dense, FAMILIES[dense.model_type], shapes, method="random", recipe={})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    randomise(model, seed=1)
    model.load_state_dict(plain.state_dict(), strict=False)
    return model


@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_the_biases_are_added_to_the_outputs(case, tmp_path):
    model, plain = with_biases(case), pruned_model(case)
    for biased, linear in zip(output_projections(model, 1), output_projections(plain, 1), strict=True):
        own = 0.0 if linear.bias is None else linear.bias.detach()
        if linear.bias is None:
            assert biased.bias.abs().max() > 0.1
        with torch.no_grad():
            biased.bias.add_(0.5)
        missing = biased.bias.detach() - own
        linear.register_forward_hook(lambda module, inputs, output, more=missing: output + more)
    with torch.no_grad():
        expected = plain(tokens()).logits
        torch.testing.assert_close(model(tokens()).logits, expected, **FLOAT64)
        model.save_pretrained(tmp_path)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        state = loaded.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, **FLOAT64)


@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_adding_biases_changes_nothing_else(case):
    model = pruned_model(case)
    spec = FAMILIES[model.config.family]
    with torch.no_grad():
        expected = model(tokens()).logits
        for index, (layer, shape) in enumerate(
            zip(model.get_submodule(spec.layers), model.config.layer_shapes, strict=True)
        ):
            apply_layer_shape(layer, model.config, spec, index, replace(shape, output_bias=True))
            assert all(linear.bias is not None for linear in output_projections(model, index))
        # A product with a bias of zeros is another kernel than one without a bias.
        torch.testing.assert_close(model(tokens()).logits, expected, **FLOAT64)


def test_shapes_without_the_field_are_read():
    shape = LayerShape(heads_per_kv=(2, 1), qk_head_dim=4, v_head_dim=4, intermediate_size=9)
    assert "output_bias" not in shape.to_dict()
    for found in (shape, replace(shape, output_bias=True)):
        assert LayerShape.from_dict(found.to_dict()) == found
