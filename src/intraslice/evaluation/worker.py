"""A child process that holds one saved model and times it on request.

Each model has a process of its own, so that peak memory is that of this model alone. The parent writes one
JSON object a line to standard input and reads one a line from standard output; end of input ends the process.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import DynamicCache, PreTrainedModel, StaticCache

from intraslice.errors import IntraSliceError, RecipeError
from intraslice.loading import count_parameters, load_model
from intraslice.placement import Placement


def main() -> None:
    """Answer requests until standard input ends."""
    # Libraries that print must not end up in the protocol: file descriptor 1 becomes standard error.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        try:
            _serve(sys.stdin, replies)
        except (IntraSliceError, MemoryError, torch.OutOfMemoryError) as error:
            text = str(error) if isinstance(error, IntraSliceError) else "not enough memory for this benchmark."
            replies.write(json.dumps({"error": text}) + "\n")


def _serve(requests: IO[str], replies: IO[str]) -> None:
    settings = json.loads(requests.readline())
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    model, _ = load_model(
        settings["model"],
        dtype=settings["dtype"],
        device=settings["device"],
        trust_remote_code=settings["trust_remote_code"],
    )
    placement = Placement(model.device, model.dtype, model.dtype, torch.float32)
    _check_length(model, settings["prompt_tokens"] + settings["decode_tokens"])
    prompt = torch.randint(model.config.vocab_size, (settings["batch_size"], settings["prompt_tokens"]))
    prompt = prompt.to(model.device)
    decoding: Any = (
        _CompiledDecoding(model, prompt, settings["decode_tokens"]) if settings["compile"] else _EagerDecoding(model)
    )
    loaded = {"parameters": count_parameters(model), "dtype": str(model.dtype).removeprefix("torch.")}
    replies.write(json.dumps({**loaded, "device": model.device.type}) + "\n")
    for line in requests:
        del line  # Every line asks for the same: one more repetition.
        measured = _repetition(model, decoding, placement, prompt, settings["decode_tokens"])
        replies.write(json.dumps({**measured, "peak_memory_bytes": _peak_memory_bytes(placement)}) + "\n")


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

    The compiled step knows the addresses of the cache, so all repetitions share one.
    """

    def __init__(self, model: PreTrainedModel, prompt_BT: torch.Tensor, decode_tokens: int) -> None:
        self._model = model
        self._prompt = prompt_BT
        self._cache = StaticCache(config=model.config, max_cache_len=prompt_BT.shape[1] + decode_tokens)
        self.step: Callable[..., Any] = torch.compile(model, dynamic=False)
        try:
            self.step(input_ids=prompt_BT[:, :1], past_key_values=self.cache(None), use_cache=True)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise RecipeError(
                f"torch.compile does not work here ({reason}); on a CPU it needs a C++ compiler. Leave out --compile."
            ) from None

    def cache(self, prefilled: Any) -> Any:
        del prefilled
        self._cache.reset()
        self._model(input_ids=self._prompt, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return self._cache


def _repetition(
    model: PreTrainedModel,
    decoding: _EagerDecoding | _CompiledDecoding,
    placement: Placement,
    prompt: torch.Tensor,
    decode_tokens: int,
) -> dict[str, float]:
    """Time one prefill of `prompt` [B, T] and `decode_tokens` greedy steps after it."""
    cache: Any = DynamicCache(config=model.config)
    placement.synchronize()
    start = time.perf_counter()
    output: Any = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)  # [B, 1]
    placement.synchronize()
    prefilled = time.perf_counter()
    cache_bytes = _cache_bytes_per_token(cache, prompt.shape[0])
    cache = decoding.cache(cache)
    placement.synchronize()
    decode_started = time.perf_counter()
    for _ in range(decode_tokens):
        output = decoding.step(input_ids=token, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    placement.synchronize()
    end = time.perf_counter()
    return {
        "prefill_tokens_per_second": prompt.numel() / (prefilled - start),
        "decode_tokens_per_second": prompt.shape[0] * decode_tokens / (end - decode_started),
        "kv_cache_bytes_per_token": cache_bytes,
    }


def _cache_bytes_per_token(cache: Any, batch_size: int) -> float:
    total = 0.0
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):  # [B, K, T, d]; a sliding window holds fewer than all T
            total += tensor.numel() * tensor.element_size() / (batch_size * tensor.shape[-2])
    return total


def _peak_memory_bytes(placement: Placement) -> int:
    if placement.device.type != "cpu":
        return placement.peak_memory_bytes()
    # On Linux ru_maxrss of a child starts at what its parent used at the fork; VmHWM starts anew.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
