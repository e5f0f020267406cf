"""A model on several texts: perplexity on each, and how far it is from the dense model.

Three numbers say how far: the log gap ln(perplexity / dense perplexity), the mean KL divergence of the predictions, and
how often the most likely token is the same. The last two need both models at once; they use every token that is
predicted, so they are much less noisy than accuracy on some hundred questions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from intraslice.errors import RecipeError
from intraslice.evaluation.perplexity import (
    Perplexity,
    check_finite,
    check_windows,
    measure_perplexity,
    select_windows,
    summed_nll,
    to_perplexity,
    window_logits,
)
from intraslice.evaluation.text_choice import TextChoice
from intraslice.placement import for_float64
from intraslice.progress import Progress, SilentProgress


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """How far the predictions of a model are from those of the dense one.

    Attributes:
        model: perplexity of the model.
        dense: perplexity of the dense model, on the same tokens.
        kl: mean KL divergence of the model's prediction from the dense one, sum p_dense ln(p_dense / p), in nats a
            token.
        agreement: share of the tokens for which both find the same token most likely.
    """

    model: Perplexity
    dense: Perplexity
    kl: float
    agreement: float


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """A model on one text.

    Attributes:
        name: of the domain.
        text: name of the text, without folders.
        first_window: number of the first window that was measured.
        perplexity: with what it was measured on.
        dense_perplexity: of the dense model; None without one, and so are the rest.
        gap: ln(perplexity / dense_perplexity).
        kl: see `Divergence`.
        agreement: see `Divergence`.
    """

    name: str
    text: str
    first_window: int
    perplexity: Perplexity
    dense_perplexity: float | None = None
    gap: float | None = None
    kl: float | None = None
    agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """A model on several texts.

    Attributes:
        texts: in the order in which they were asked for.
        mean_gap: plain mean over the texts; None without a dense model, and so are the rest.
        mean_kl: the same of the KL divergences.
        mean_agreement: the same of the agreements.
        seconds: wall-clock seconds of all forward passes.
    """

    texts: list[TextScore]
    mean_gap: float | None
    mean_kl: float | None
    mean_agreement: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def measure_texts(
    model: PreTrainedModel,
    texts: Sequence[tuple[TextChoice, Tensor]],
    *,
    dense: PreTrainedModel | None = None,
    seqlen: int = 2048,
    progress: Progress | None = None,
) -> TextScores:
    """Measure a model on several texts, with `dense` also how far it is from that one.

    Args:
        model: a causal language model in evaluation mode.
        texts: which windows are measured, and the tokens of the whole text, int64 [N].
        dense: the model that it was made from.
        seqlen: tokens in a window.
        progress: shows the windows.

    Raises:
        CalibrationError: a stream is too short, or has ids outside the vocabulary.
        RecipeError: seqlen or windows are out of range, or the vocabularies differ.
        NumericalError: the outputs of a model are not finite.
    """
    started = time.perf_counter()
    # All of them first: a text that is too short must not cost the measuring of the others.
    for choice, tokens in texts:
        check_windows(model.config, tokens, seqlen, choice.windows, first=choice.first)
    scores = [_score(model, choice, tokens, dense, seqlen, progress) for choice, tokens in texts]
    return TextScores(
        texts=scores,
        mean_gap=_mean([score.gap for score in scores]),
        mean_kl=_mean([score.kl for score in scores]),
        mean_agreement=_mean([score.agreement for score in scores]),
        seconds=time.perf_counter() - started,
    )


def check_same_tokens(tokens: Sequence[Tensor], dense_tokens: Sequence[Tensor]) -> None:
    """Refuse a dense model whose tokenizer cuts the same texts in another way.

    Raises:
        RecipeError: predictions of other tokens cannot be compared.
    """
    if not all(torch.equal(own, other) for own, other in zip(tokens, dense_tokens, strict=True)):
        raise RecipeError(
            "the tokenizers of the model and of the dense one cut the text differently, so their predictions cannot be "
            "compared; name the model that it was made from."
        )


def _score(
    model: PreTrainedModel,
    choice: TextChoice,
    tokens: Tensor,
    dense: PreTrainedModel | None,
    seqlen: int,
    progress: Progress | None,
) -> TextScore:
    named: dict[str, Any] = {"name": choice.name, "text": choice.source, "first_window": choice.first}
    chosen: dict[str, Any] = {"seqlen": seqlen, "windows": choice.windows, "first": choice.first, "progress": progress}
    if dense is None:
        return TextScore(**named, perplexity=measure_perplexity(model, tokens, **chosen))
    found = measure_divergence(model, dense, tokens, **chosen)
    return TextScore(
        **named,
        perplexity=found.model,
        dense_perplexity=found.dense.perplexity,
        gap=found.model.mean_nll - found.dense.mean_nll,
        kl=found.kl,
        agreement=found.agreement,
    )


def measure_divergence(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokens: Tensor,
    *,
    seqlen: int = 2048,
    windows: int | None = None,
    first: int = 0,
    progress: Progress | None = None,
) -> Divergence:
    """Run two models over the same windows; the logits of both exist for some hundred positions at a time.

    Args:
        model: a causal language model in evaluation mode.
        dense: another one with the same vocabulary.
        tokens: int64 [N].
        seqlen: tokens in a window; the predictions of all but its last one count.
        windows: measure at most so many windows; None measures all.
        first: number of the first one.
        progress: shows the windows.

    Raises:
        CalibrationError: the stream is too short, or has ids outside the vocabulary.
        RecipeError: seqlen or windows are out of range, or the vocabularies differ.
        NumericalError: the outputs of a model are not finite.
    """
    sizes = model.config.vocab_size, dense.config.vocab_size
    if sizes[0] != sizes[1]:
        raise RecipeError(
            f"the model has a vocabulary of {sizes[0]} tokens and the dense one of {sizes[1]}; compare it with the "
            "model that it was made from."
        )
    check_windows(dense.config, tokens, seqlen, windows, first=first)
    blocks = select_windows(model.config, tokens, seqlen, windows, first)  # [W, T]
    started = time.perf_counter()
    totals = torch.zeros(4, dtype=torch.float64)
    with torch.inference_mode(), (progress or SilentProgress()).step("perplexity and KL", len(blocks)) as advance:
        for index, block in enumerate(blocks):
            window = block[None]
            pairs = zip(
                *(window_logits(one, window.to(one.device), always_split=True) for one in (model, dense)), strict=True
            )
            own, other = 0.0, 0.0
            for (logits, targets), (dense_logits, _) in pairs:
                dense_logits = dense_logits.to(logits.device)
                own += summed_nll(logits, targets)
                other += summed_nll(dense_logits, targets)
                kl, agreed = _compare(logits.float(), dense_logits.float())
                totals[2:] += torch.tensor([kl, agreed], dtype=torch.float64)
            check_finite(own, index)
            check_finite(other, index, "the dense model")
            totals[:2] += torch.tensor([own, other], dtype=torch.float64)
            advance(1)
    count = len(blocks) * (seqlen - 1)
    seconds = time.perf_counter() - started
    found = [to_perplexity(float(total), len(blocks), seqlen, seconds) for total in totals[:2]]
    return Divergence(
        model=found[0],
        dense=found[1],
        kl=float(totals[2]) / count,
        agreement=float(totals[3]) / count,
    )


def _compare(logits: Tensor, dense_logits: Tensor) -> tuple[float, int]:
    """Return the summed KL divergence and the number of equal greedy tokens of predictions [p, V]."""
    log_q = functional.log_softmax(logits, dim=-1)
    log_p = functional.log_softmax(dense_logits, dim=-1)
    per_token = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)  # [p]
    agreed = (logits.argmax(-1) == dense_logits.argmax(-1)).sum()
    # Rounding can leave a sum of terms of both signs a little below zero.
    return float(for_float64(per_token).double().clamp(min=0).sum()), int(agreed)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(values) if values and len(known) == len(values) else None
