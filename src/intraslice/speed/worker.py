"""The child process that holds one saved model and times it on request.

Each model has a process of its own, so that the peak memory is that of this model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from torch._dynamo.exc import TorchDynamoException
from transformers import DynamicCache, PreTrainedModel, StaticCache

from intraslice.errors import RecipeError
from intraslice.loading import count_parameters, load_model
from intraslice.placement import Placement
from intraslice.process import Parent
from intraslice.runtime.configuration_intraslice import CACHE_ARGUMENT


def serve(requests: Iterator[dict[str, Any]], parent: Parent) -> None:
    """Load the model that the first request names, then time it at the batch size and KV length of each further one.

    Raises:
        IntraSliceError: the model cannot be loaded or cannot run this.
    """
    try:
        _serve(requests, parent)
    except (MemoryError, torch.OutOfMemoryError):
        raise RecipeError("not enough memory for this benchmark.") from None


def _serve(requests: Iterator[dict[str, Any]], parent: Parent) -> None:
    settings = next(requests)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    model, _ = load_model(
        settings["model"],
        dtype=settings["dtype"],
        device=settings["device"],
        trust_remote_code=settings["trust_remote_code"],
    )
    placement = Placement(model.device, model.dtype, model.dtype, torch.float32)
    _check_length(model, settings["longest_prompt"] + settings["decode_tokens"])
    bench = _Bench(model, placement, settings["decode_tokens"], compiled=settings["compile"])
    loaded = {"parameters": count_parameters(model), "dtype": str(model.dtype).removeprefix("torch.")}
    parent.done({**loaded, "device": model.device.type})
    for point in requests:
        measured = bench.repetition(**point)
        parent.done({**measured, "peak_memory_bytes": placement.peak_memory_bytes()})


def _check_length(model: PreTrainedModel, length: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise RecipeError(f"prompt and decoded tokens are {length}, beyond the {limit} positions of the model.")


class _EagerDecoding:
    """Decodes operation by operation, on the cache that the prefill has filled."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.step: Callable[..., Any] = model

    def cache(self, prefilled: Any) -> Any:
        return prefilled


class _CompiledDecoding:
    """Decodes through torch.compile, which wants a cache of one size.

    The compiled step knows the size and the addresses of the cache, so all repetitions at one batch size and KV
    length share one, and others have their own.
    """

    def __init__(self, model: PreTrainedModel, prompt_BT: torch.Tensor, decode_tokens: int) -> None:
        self._model = model
        self._prompt = prompt_BT
        self._cache = StaticCache(config=model.config, max_cache_len=prompt_BT.shape[1] + decode_tokens)
        # Beyond the limit torch.compile would go on without compiling, and say so only in a log.
        dynamo_config.recompile_limit += 1
        self.step: Callable[..., Any] = torch.compile(model, dynamic=False)
        try:
            self.step(input_ids=prompt_BT[:, :1], **{CACHE_ARGUMENT: self.cache(None)}, use_cache=True)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise RecipeError(
                f"torch.compile does not work here ({reason}); on a CPU it needs a C++ compiler. Leave out --compile."
            ) from None

    def cache(self, prefilled: Any) -> Any:
        del prefilled
        self._cache.reset()
        self._model(input_ids=self._prompt, **{CACHE_ARGUMENT: self._cache}, use_cache=True, logits_to_keep=1)
        return self._cache


class _Bench:
    """A loaded model that is timed at any batch size and KV length."""

    def __init__(self, model: PreTrainedModel, placement: Placement, decode_tokens: int, *, compiled: bool) -> None:
        self._model = model
        self._placement = placement
        self._decode_tokens = decode_tokens
        self._compiled = compiled
        self._decoding: dict[tuple[int, int], _EagerDecoding | _CompiledDecoding] = {}

    def repetition(self, batch_size: int, kv_length: int) -> dict[str, float]:
        """Time one prefill of `kv_length` tokens and the greedy steps that follow on its cache."""
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(self._model.config.vocab_size, (batch_size, kv_length), generator=generator)
        prompt = prompt.to(self._model.device)
        decoding = self._decoding_of(prompt)
        filled: Any = DynamicCache(config=self._model.config)
        prefill_seconds, token = self._placement.timed(
            lambda: self._next_token(self._model, prompt, filled, logits_to_keep=1)
        )
        per_token, total = _cache_bytes(filled, batch_size)
        cache = decoding.cache(filled)
        decode_seconds, _ = self._placement.timed(lambda: self._decode(decoding, token, cache))
        return {
            "prefill_tokens_per_second": prompt.numel() / prefill_seconds,
            "decode_tokens_per_second": batch_size * self._decode_tokens / decode_seconds,
            "kv_cache_bytes_per_token": per_token,
            "kv_cache_bytes": total,
        }

    def _decoding_of(self, prompt_BT: torch.Tensor) -> _EagerDecoding | _CompiledDecoding:
        batch_size, kv_length = prompt_BT.shape
        point = batch_size, kv_length
        if point not in self._decoding:
            self._decoding[point] = (
                _CompiledDecoding(self._model, prompt_BT, self._decode_tokens)
                if self._compiled
                else _EagerDecoding(self._model)
            )
        return self._decoding[point]

    def _decode(self, decoding: _EagerDecoding | _CompiledDecoding, token_B1: torch.Tensor, cache: Any) -> torch.Tensor:
        for _ in range(self._decode_tokens):
            token_B1 = self._next_token(decoding.step, token_B1, cache)
        return token_B1

    @staticmethod
    def _next_token(step: Callable[..., Any], ids_BT: torch.Tensor, cache: Any, **kwargs: Any) -> torch.Tensor:
        output = step(input_ids=ids_BT, **{CACHE_ARGUMENT: cache}, use_cache=True, **kwargs)
        return output.logits[:, -1:].argmax(-1)  # [B, 1]


def _cache_bytes(cache: Any, batch_size: int) -> tuple[float, int]:
    """Return the bytes of keys and values for one token of one sequence, and of all that the cache holds."""
    per_token, total = 0.0, 0
    for layer in cache.layers:
        if layer.keys is None:
            # A layer without attention.
            continue
        for tensor in (layer.keys, layer.values):  # [B, K, T, d]; a sliding window holds fewer than all T
            size = tensor.numel() * tensor.element_size()
            per_token += size / (batch_size * tensor.shape[-2])
            total += size
    return per_token, total
