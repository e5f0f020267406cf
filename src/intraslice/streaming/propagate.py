"""Advances hidden states through a layer."""

from __future__ import annotations

import torch

from intraslice.layers.decoder import DecoderLayer
from intraslice.streaming.hidden import HiddenStates


@torch.no_grad()
def propagate_layer(layer: DecoderLayer, hidden: HiddenStates) -> None:
    """Advance one stream through a layer, dense or finished.

    Attention for all batches first, then the FFN: the operations of a prune in their order, so that a resumed run sees
    the same numbers.

    Args:
        layer: the layer.
        hidden: its inputs; overwritten by its outputs.
    """
    for part in hidden.slices():
        hidden.write(part, layer.attention_step(hidden.read(part)))
    propagate_ffn(layer, hidden)


def propagate_ffn(layer: DecoderLayer, hidden: HiddenStates) -> None:
    """Advance one stream through the FFN of a layer."""
    for part in hidden.slices():
        hidden.write(part, layer.ffn_step(hidden.read(part)))
