"""Writes neutral weights into a decoder layer of a new shape. The only file that changes modules.

Shapes: O outputs of a Linear, C inputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.state_dict import Part, attention_parts, ffn_parts, join_parts, norm_weights
from intraslice.layers.weights import AttentionWeights, FFNWeights
from intraslice.runtime.families_intraslice import FamilySpec, LayerShape
from intraslice.runtime.modeling_intraslice import FactoredLinear, apply_layer_shape


def _write(module: nn.Module, parts: list[Part]) -> None:
    """Write the Linears of a block, cast once to their dtype."""
    for path, (weight, bias) in join_parts(parts).items():
        linear = module.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if linear.bias is not None:
                # Without one, the shape has a bias for the sake of the other output projection of the layer.
                linear.bias.zero_() if bias is None else linear.bias.copy_(bias)


def write_attention(
    block: DecoderLayer,
    config: Any,
    layer_idx: int,
    shape: LayerShape,
    weights: AttentionWeights,
    rope_pairs: Tensor | None,
) -> None:
    """Replace the attention of the layer by one of `shape` with these weights.

    Args:
        block: the layer; changed in place.
        config: the dense config.
        layer_idx: its index.
        shape: the shape of the whole layer (its FFN part must already hold).
        weights: q [H', r, D], k [K', r, D], v [K', p, D], o [D, H' * p] and biases.
        rope_pairs: int64 [K', r / 2], or None when all pairs are kept.
    """
    spec: FamilySpec = block.spec
    apply_layer_shape(block.module, config, spec, layer_idx, shape)
    module = block.attention

    _write(module, attention_parts(weights, spec, shape))
    with torch.no_grad():
        for name, weight in norm_weights(weights, spec, shape.headed_qk_norm).items():
            module.get_parameter(name).copy_(weight)
    if rope_pairs is not None:
        module.set_rope_pairs(rope_pairs)


def write_ffn(block: DecoderLayer, config: Any, layer_idx: int, shape: LayerShape, weights: FFNWeights) -> None:
    """Resize the FFN of the layer to `shape` and write these weights; attention already has that shape."""
    spec = block.spec
    apply_layer_shape(block.module, config, spec, layer_idx, shape)
    _write(block.ffn, ffn_parts(weights, spec))


def drop_block(block: DecoderLayer, config: Any, layer_idx: int, name: str) -> None:
    """Take a whole block, "attention" or "ffn", out of the layer."""
    apply_layer_shape(block.module, config, block.spec, layer_idx, block.shape.without(name))


def write_factors(block: DecoderLayer, path: str, first_rC: Tensor, second_Or: Tensor, save_dtype: torch.dtype) -> None:
    """Replace a Linear of the layer by two factors; the bias stays.

    Args:
        block: the layer; changed in place.
        path: of the Linear, within the layer.
        first_rC: [r, C].
        second_Or: [O, r].
        save_dtype: what the factors are rounded to, so that later layers, and a resumed run, see what is saved.
    """
    linear = block.module.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    factored = FactoredLinear.like(linear, first_rC.shape[0])
    with torch.no_grad():
        factored.first.weight.copy_(first_rC.to(save_dtype))
        factored.second.weight.copy_(second_Or.to(save_dtype))
        if linear.bias is not None:
            factored.second.bias.copy_(linear.bias)
    block.module.set_submodule(path, factored)
