"""One decoder layer alone, timed inside the model it belongs to.

The Hugging Face model itself runs, with layers that do nothing beside the one that is timed: masks, positions, rotary
tables and caches are the model's own, without any family code, and only the layer is on the clock.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from intraslice.placement import Placement
from intraslice.runtime.configuration_intraslice import CACHE_ARGUMENT
from intraslice.runtime.modeling_intraslice import take_cache


class _Skipped(nn.Module):
    """Stands where a decoder layer was: passes the hidden states on, and grows the cache by empty keys and values.

    The model counts its positions by the length of the cache.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        cache = take_cache(kwargs)
        if cache is not None:
            empty = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)  # [B, K, T, d]
            cache.update(empty, empty, self.layer_idx)
        return hidden_states


class _Timed(nn.Module):
    """Runs a decoder layer and remembers how long it took."""

    def __init__(self, layer: nn.Module, placement: Placement) -> None:
        super().__init__()
        self.layer = layer
        self.seconds = 0.0
        self._placement = placement

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seconds, output = self._placement.timed(lambda: self.layer(*args, **kwargs))
        return output


class LayerHost:
    """A model that runs one decoder layer at a time, its own or another one of its width.

    Args:
        model: a causal language model; its layers are taken out.
        layers_path: where they are.
        placement: the model's device, which decides how time is taken.
    """

    def __init__(self, model: PreTrainedModel, layers_path: str, placement: Placement) -> None:
        self.placement = placement
        self.config: Any = model.config
        self._model = model
        parent, _, self._name = layers_path.rpartition(".")
        self._decoder = model.get_submodule(parent)
        layers = model.get_submodule(layers_path)
        assert isinstance(layers, nn.ModuleList)
        self.layers = list(layers)
        self._skipped = [_Skipped(index) for index in range(len(self.layers))]
        self._put({})

    def _put(self, layers: dict[int, nn.Module]) -> None:
        chosen = [layers.get(index, skipped) for index, skipped in enumerate(self._skipped)]
        setattr(self._decoder, self._name, nn.ModuleList(chosen))

    def tokens(self, batch_size: int, length: int) -> Tensor:
        """Return random token ids, [B, T]."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.config.vocab_size, (batch_size, length), generator=generator).to(
            self.placement.device
        )

    def empty_cache(self) -> Any:
        """Return a cache for `layer_seconds` to fill."""
        return DynamicCache(config=self.config)

    @torch.no_grad()
    def layer_seconds(self, index: int, layer: nn.Module, tokens_BT: Tensor, cache: Any) -> float:
        """Return the seconds that `layer` takes for new tokens, in the place of layer `index`; extends the cache."""
        timed = _Timed(layer, self.placement)
        self._put({index: timed})
        self._model.base_model(input_ids=tokens_BT, **{CACHE_ARGUMENT: cache}, use_cache=True)
        self._put({})
        return timed.seconds

    def step_seconds(self, index: int, layer: nn.Module, filled: Any, batch_size: int, steps: int) -> float:
        """Return the median seconds of single tokens after what is in the cache, which stays as it is."""
        cache, token = copy.deepcopy(filled), self.tokens(batch_size, 1)
        return statistics.median(self.layer_seconds(index, layer, token, cache) for _ in range(steps))

    @torch.no_grad()
    def rest_seconds(self, tokens_BT: Tensor, cache: Any) -> float:
        """Return the seconds of everything but the layers, logits of the last token included; extends the cache."""
        seconds, _ = self.placement.timed(
            lambda: self._model(input_ids=tokens_BT, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
        )
        return seconds


def one_layer_model(config: Any, placement: Placement) -> PreTrainedModel:
    """Return a dense model with a single decoder layer and random weights.

    Args:
        config: stock config of the model.
        placement: device, and dtype of the weights.
    """
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    with torch.random.fork_rng(devices=[]), torch.device(placement.device):
        return AutoModelForCausalLM.from_config(small, dtype=placement.compute_dtype).eval().requires_grad_(False)
