"""Writes neutral weights into a decoder layer of a new shape. The only file that changes modules.

Shapes: O outputs of a Linear, C inputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.weights import AttentionWeights, FFNWeights
from intraslice.runtime.families_intraslice import FamilySpec, LayerShape, Slot
from intraslice.runtime.modeling_intraslice import FactoredLinear, apply_layer_shape


def _fill(linear: nn.Linear, parts: list[tuple[Tensor, Tensor | None]]) -> None:
    """Write the rows of all parts of a Linear, cast once to its dtype."""
    with torch.no_grad():
        linear.weight.copy_(torch.cat([weight for weight, _ in parts]))
        if linear.bias is not None:
            biases = [bias for _, bias in parts if bias is not None]
            # Without one, the shape has a bias for the sake of the other output projection of the layer.
            linear.bias.copy_(torch.cat(biases)) if biases else linear.bias.zero_()


def _write(module: nn.Module, slots: list[tuple[Slot, Tensor, Tensor | None]]) -> None:
    by_path: dict[str, list[tuple[int, Tensor, Tensor | None]]] = {}
    for slot, weight, bias in slots:
        by_path.setdefault(slot.path, []).append((slot.part, weight, bias))
    for path, parts in by_path.items():
        linear = module.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        _fill(linear, [(weight, bias) for _, weight, bias in sorted(parts, key=lambda part: part[0])])


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

    def rows(tensor: Tensor | None, flat: int) -> Tensor | None:
        return None if tensor is None else tensor.reshape(flat)

    _write(
        module,
        [
            (spec.q, weights.q.flatten(0, 1), rows(weights.q_bias, -1)),
            (spec.k, weights.k.flatten(0, 1), rows(weights.k_bias, -1)),
            (spec.v, weights.v.flatten(0, 1), rows(weights.v_bias, -1)),
            (spec.o, weights.o, weights.o_bias),
        ],
    )
    if rope_pairs is not None:
        module.set_rope_pairs(rope_pairs)


def write_ffn(block: DecoderLayer, config: Any, layer_idx: int, shape: LayerShape, weights: FFNWeights) -> None:
    """Resize the FFN of the layer to `shape` and write these weights; attention already has that shape."""
    spec = block.spec
    apply_layer_shape(block.module, config, spec, layer_idx, shape)
    slots = [(spec.up, weights.up, weights.up_bias), (spec.down, weights.down, weights.down_bias)]
    if spec.gate is not None:
        assert weights.gate is not None
        slots.append((spec.gate, weights.gate, weights.gate_bias))
    _write(block.ffn, slots)


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
