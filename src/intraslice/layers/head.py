"""What a causal language model does with the outputs of its decoder.

Shapes: D width of those outputs, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


class LanguageHead:
    """Logits for given outputs of the decoder, by the model's own forward pass: a model may scale or cap them.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._decoder = model.get_decoder()

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] for decoder outputs [..., D]."""
        states: Any = hidden.reshape(1, -1, hidden.shape[-1])
        # The one with the most fields: GPT-2 asks for attention to an encoder, which is empty.
        given = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)
        tokens = torch.zeros((1, hidden[..., 0].numel()), dtype=torch.int64, device=hidden.device)
        # The decoder stays where the model looks for it, but hands out what is given. Others may have wrapped it.
        wrapped = vars(self._decoder).get("forward")
        self._decoder.forward = lambda *args, **kwargs: given
        try:
            logits = self._model(input_ids=tokens, use_cache=False).logits
        finally:
            if wrapped is None:
                del self._decoder.forward
            else:
                self._decoder.forward = wrapped
        return logits.reshape(*hidden.shape[:-1], -1)
