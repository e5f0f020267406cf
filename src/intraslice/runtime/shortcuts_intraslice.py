"""Decoder layers with a matrix on each residual connection, as a rotated and sliced residual stream needs them.

Between two blocks the stream changes from the leading directions of one rotation to those of the next; the weights of
the norms are in the Linears that follow. Paper: SliceGPT, arXiv 2401.15024.

This file travels with every pruned checkpoint (`trust_remote_code=True`), so it may import only the standard
library, torch and transformers.

Shapes: B batch, T tokens, D hidden_size (of the sliced stream).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

if TYPE_CHECKING:
    _LayerBase = LlamaDecoderLayer
else:
    _LayerBase = object


class _Shortcuts(_LayerBase):
    """What the four layers share; their modules have the same names."""

    attn_shortcut: nn.Linear
    mlp_shortcut: nn.Linear

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the hidden states after the layer [B, T, D], of [B, T, D] before it.

        Args:
            hidden_states: [B, T, D].
            kwargs: what the attention module takes.
        """
        output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = self.attn_shortcut(hidden_states) + output
        return self.mlp_shortcut(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))


class SlicedLlamaDecoderLayer(_Shortcuts, LlamaDecoderLayer):
    """Layer of Llama with a matrix on each residual connection."""


class SlicedMistralDecoderLayer(_Shortcuts, MistralDecoderLayer):
    """Layer of Mistral with a matrix on each residual connection."""


class SlicedQwen2DecoderLayer(_Shortcuts, Qwen2DecoderLayer):
    """Layer of Qwen2 with a matrix on each residual connection."""


class SlicedPhi3DecoderLayer(_Shortcuts, Phi3DecoderLayer):
    """Layer of Phi3 with a matrix on each residual connection."""


_SLICED: dict[type[nn.Module], type[nn.Module]] = {
    LlamaDecoderLayer: SlicedLlamaDecoderLayer,
    MistralDecoderLayer: SlicedMistralDecoderLayer,
    Qwen2DecoderLayer: SlicedQwen2DecoderLayer,
    Phi3DecoderLayer: SlicedPhi3DecoderLayer,
}


def add_shortcuts(layer: nn.Module, hidden_size: int) -> None:
    """Turn a stock decoder layer into one with a matrix on each residual connection, in place.

    The matrices get the device and dtype of the layer and are not initialised.

    Args:
        layer: decoder layer of the stock class.
        hidden_size: width of the residual stream.
    """
    like = next(layer.parameters())
    for name in ("attn_shortcut", "mlp_shortcut"):
        # Under the meta device nothing is initialised, to_empty allocates only.
        shortcut = nn.Linear(hidden_size, hidden_size, bias=False, device="meta", dtype=like.dtype)
        shortcut = shortcut if like.device.type == "meta" else shortcut.to_empty(device=like.device)
        layer.add_module(name, shortcut.requires_grad_(like.requires_grad))
    # The modules are already there; only what `forward` does with them is another.
    layer.__class__ = _SLICED[type(layer)]
