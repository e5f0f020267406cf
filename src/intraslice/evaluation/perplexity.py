"""Perplexity of one token stream, cut into windows that do not overlap."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from intraslice.data.windows import begin_windows, first_token
from intraslice.errors import CalibrationError, NumericalError, RecipeError
from intraslice.layers.head import LanguageHead
from intraslice.placement import for_float64
from intraslice.progress import Progress, SilentProgress
from intraslice.runtime.families_intraslice import FAMILIES

CHUNK_POSITIONS = 512
"""Positions whose logits exist at once: a vocabulary of 49k x 512 float32 numbers is 100 MB."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity and what it was measured on.

    Attributes:
        perplexity: exp(mean_nll).
        mean_nll: mean negative log likelihood of a predicted token, in nats.
        num_windows: windows measured.
        num_tokens: predicted tokens, seqlen - 1 in each window.
        seqlen: tokens in a window.
        seconds: wall-clock seconds of the forward passes.
    """

    perplexity: float
    mean_nll: float
    num_windows: int
    num_tokens: int
    seqlen: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def measure_perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    seqlen: int = 2048,
    windows: int | None = None,
    first: int = 0,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure the perplexity of a token stream; tokens after the last whole window are left out.

    Args:
        model: a causal language model in evaluation mode.
        tokens: int64 [N].
        seqlen: tokens in a window; the first one of each window is not predicted.
        windows: measure at most so many windows; None measures all.
        first: number of the first window that is measured.
        progress: shows the windows.

    Raises:
        CalibrationError: the stream holds no whole window, or ids outside the vocabulary.
        RecipeError: seqlen or windows is out of range for the model.
        NumericalError: the model's outputs are not finite.
    """
    blocks = select_windows(model.config, tokens, seqlen, windows, first)  # [W, T]
    total = 0.0
    start = time.perf_counter()
    with torch.inference_mode(), (progress or SilentProgress()).step("perplexity", len(blocks)) as advance:
        for index, block in enumerate(blocks):
            nll = _window_nll(model, block.to(model.device)[None])
            check_finite(nll, index)
            total += nll
            advance(1)
    return to_perplexity(total, len(blocks), seqlen, time.perf_counter() - start)


def check_finite(nll: float, window: int, whose: str = "the model") -> None:
    """Refuse a negative log likelihood that is no number.

    Raises:
        NumericalError: the outputs were not finite.
    """
    if not math.isfinite(nll):
        raise NumericalError(f"{whose}'s outputs are not finite in window {window}; try --dtype float32 or bfloat16.")


def to_perplexity(total: float, num_windows: int, seqlen: int, seconds: float) -> Perplexity:
    """Return the perplexity of a summed negative log likelihood."""
    num_tokens = num_windows * (seqlen - 1)
    mean = total / num_tokens
    return Perplexity(
        # A broken model can exceed the largest float; that is a result, not an error.
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        mean_nll=mean,
        num_windows=num_windows,
        num_tokens=num_tokens,
        seqlen=seqlen,
        seconds=seconds,
    )


def select_windows(config: Any, tokens: Tensor, seqlen: int, windows: int | None, first: int = 0) -> Tensor:
    """Return the windows of a token stream [N] that are measured, int64 [W, T]; see `check_windows`.

    Models that need it find their BOS token in the place of the first token of each window, which is not predicted.
    """
    count = check_windows(config, tokens, seqlen, windows, first=first)
    return begin_windows(tokens[first * seqlen : (first + count) * seqlen].view(count, seqlen), first_token(config))


def check_windows(config: Any, tokens: Tensor, seqlen: int, windows: int | None, *, first: int = 0) -> int:
    """Return how many windows of a token stream [N] are measured, of those from `first` on.

    Raises:
        CalibrationError: the stream holds no whole window, or ids outside the vocabulary.
        RecipeError: seqlen or windows is out of range for the model.
    """
    if seqlen < 2:
        raise RecipeError(f"seqlen must be at least 2, got {seqlen}.")
    if windows is not None and windows < 1:
        raise RecipeError(f"windows must be at least 1, got {windows}.")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and seqlen > limit:
        raise RecipeError(f"seqlen {seqlen} is beyond the {limit} positions of the model; use --seqlen {limit}.")
    available = tokens.numel() // seqlen
    if available == 0:
        raise CalibrationError(
            f"the text has {tokens.numel()} tokens, less than one window of {seqlen}; "
            "give a longer text or a smaller --seqlen."
        )
    if available <= first:
        raise CalibrationError(
            f"the text has {available} windows of {seqlen} tokens, so there is no window {first}; they count from 0."
        )
    largest = int(tokens.max())
    if largest >= config.vocab_size:
        raise CalibrationError(
            f"token id {largest} is outside the vocabulary of {config.vocab_size}; "
            "the tokenizer does not belong to the model."
        )
    return available - first if windows is None else min(available - first, windows)


def _window_nll(model: PreTrainedModel, window: Tensor) -> float:
    """Return the summed negative log likelihood of tokens 1..T-1 of a window [1, T]."""
    return sum(summed_nll(logits, targets) for logits, targets in window_logits(model, window))


def window_logits(
    model: PreTrainedModel, window: Tensor, *, always_split: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits [p, V] and the tokens that they predict [p], chunk by chunk, for tokens 1..T-1 of a window [1, T].

    Args:
        model: a causal language model in evaluation mode.
        window: token ids, [1, T].
        always_split: in chunks also where all logits exist at once anyway, because the architecture is unknown.
    """
    targets = window[0, 1:].split(CHUNK_POSITIONS)
    parts = decoder_and_head(model)
    if parts is None:
        logits = model(input_ids=window, use_cache=False).logits[0, :-1]  # [T - 1, V]
        if always_split:
            yield from zip(logits.split(CHUNK_POSITIONS), targets, strict=True)
        else:
            yield logits, window[0, 1:]
        return
    decoder, head = parts
    hidden = decoder(input_ids=window, use_cache=False).last_hidden_state[0, :-1]  # [T - 1, D]
    for chunk, target in zip(hidden.split(CHUNK_POSITIONS), targets, strict=True):
        yield head(chunk), target


def decoder_and_head(model: PreTrainedModel) -> tuple[Any, Any] | None:
    """Return the decoder of a model, and what makes logits of its outputs.

    None for architectures that we do not know.
    """
    if model.config.model_type.removeprefix("intraslice_") not in FAMILIES:
        return None
    return model.base_model, LanguageHead(model)


def summed_nll(logits: Tensor, targets: Tensor) -> float:
    """Return the summed negative log likelihood of tokens [p] under logits [p, V]."""
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")  # [T]
    return float(for_float64(losses).double().sum())
