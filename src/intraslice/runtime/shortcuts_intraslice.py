"""Decoder layers with a matrix on each residual connection, as a rotated and sliced residual stream needs them.

Between two sites the stream changes from the leading directions of one rotation to those of the next; the weights of
the norms are in the Linears that follow. Paper: SliceGPT, arXiv 2401.15024.

This file travels with every pruned checkpoint (`trust_remote_code=True`), so it may import only the standard
library, torch, transformers and its neighbours.

Shapes: B batch, T tokens, D hidden_size (of the sliced stream).
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from .configuration_intraslice import class_stem, known_families, stock_config_class
from .families_intraslice import FAMILIES, FamilySpec

if TYPE_CHECKING:
    _LayerBase = GradientCheckpointingLayer
else:
    _LayerBase = object


class _Shortcuts(_LayerBase):
    """What such layers of all families do instead of what their stock class does."""

    family: str
    attn_shortcut: nn.Linear
    mlp_shortcut: nn.Linear

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the hidden states after the layer, of [B, T, D] before it; the last layer may give wider ones.

        Args:
            hidden_states: [B, T, D].
            kwargs: what the attention module takes.
        """
        spec = FAMILIES[self.family]
        # Only families whose blocks read norms are rotated.
        attention_norm, ffn_norm = getattr(self, str(spec.attention_norm)), getattr(self, str(spec.ffn_norm))
        output, _ = getattr(self, spec.attention)(attention_norm(hidden_states), **kwargs)
        hidden_states = self.attn_shortcut(hidden_states) + output
        return self.mlp_shortcut(hidden_states) + getattr(self, spec.mlp)(ffn_norm(hidden_states))


@cache
def _sliced_class(stock: type[nn.Module], family: str) -> type[nn.Module]:
    name = f"Sliced{stock.__name__}"
    fields = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{stock.__name__} with a matrix on each residual connection.",
        "family": family,
    }
    return type(name, (_Shortcuts, stock), fields)


def __getattr__(name: str) -> Any:
    # Pickles name the classes; one is made when it is asked for.
    for family in known_families():
        stock = f"{class_stem(family)}DecoderLayer"
        if name == f"Sliced{stock}":
            module = sys.modules[MODEL_MAPPING[stock_config_class(family)].__module__]
            return _sliced_class(getattr(module, stock), family)
    raise AttributeError(f"{__name__} has no class {name!r}")


def add_shortcuts(layer: nn.Module, spec: FamilySpec, hidden_size: int, output_size: int) -> None:
    """Turn a stock decoder layer into one with a matrix on each residual connection, in place.

    The matrices get the device and dtype of the layer and are not initialised.

    Args:
        layer: decoder layer of the stock class.
        spec: the family.
        hidden_size: width of the residual stream.
        output_size: its width behind the layer.
    """
    like = next(layer.parameters())
    for name, width in (("attn_shortcut", hidden_size), ("mlp_shortcut", output_size)):
        # Under the meta device nothing is initialised, to_empty allocates only.
        shortcut = nn.Linear(hidden_size, width, bias=False, device="meta", dtype=like.dtype)
        shortcut = shortcut if like.device.type == "meta" else shortcut.to_empty(device=like.device)
        layer.add_module(name, shortcut.requires_grad_(like.requires_grad))
    # The modules are already there; only what `forward` does with them is another.
    layer.__class__ = _sliced_class(type(layer), spec.name)
