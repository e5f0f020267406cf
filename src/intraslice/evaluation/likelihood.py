"""Log likelihood of continuations of contexts, with each context computed once.

The answers to a question share its tokens. A context and all its continuations go through the model as one sequence:
each continuation gets the positions right after the context and a mask that hides the other continuations, so every
token sees exactly what it would see alone. A 0-shot multiple-choice task shrinks to about half of its tokens.

Shapes: B sequences, T tokens in the longest one, P predicted tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intraslice.evaluation.perplexity import CHUNK_POSITIONS, decoder_and_head

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context (at least one) and of its continuation."""

_PADDING = -1


@dataclass(frozen=True)
class _Pack:
    """A context and its continuations as one sequence.

    Attributes:
        tokens: the context, then each continuation without its last token, which nothing follows.
        positions: of the tokens, for the position embedding.
        branches: 0 in the context, k in the k-th continuation.
        requests: number of the request that each continuation belongs to.
        sources: for each continuation, the places in `tokens` whose outputs predict its tokens.
    """

    tokens: list[int]
    positions: list[int]
    branches: list[int]
    requests: list[int]
    sources: list[list[int]]


def can_pack(model: PreTrainedModel, requests: Sequence[Request]) -> bool:
    """Say whether `score_continuations` computes the same as the model's own forward pass, request by request.

    Its attention has to take any mask, its logits have to be those of its head, and no request may be longer than a
    sliding window, which a mask that is given replaces.
    """
    window = getattr(model.config, "sliding_window", None)
    longest = max(len(context) + len(continuation) for context, continuation in requests)
    takes_masks = model.config._attn_implementation in ("sdpa", "eager")
    return takes_masks and decoder_and_head(model) is not None and (window is None or longest <= window)


@torch.inference_mode()
def score_continuations(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    batch_size: int,
    advance: Callable[[int], None],
) -> list[tuple[float, bool]]:
    """Score continuations; only for models and requests that `can_pack` accepts.

    Args:
        model: a causal language model in evaluation mode.
        requests: none longer than the positions of the model.
        batch_size: contexts at a time.
        advance: is called with the number of finished requests.

    Returns:
        For each request the log likelihood of the continuation, in nats, and whether each of its tokens is the most
        likely one.
    """
    parts = decoder_and_head(model)
    assert parts is not None
    scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    packs = sorted(_packs(requests), key=lambda pack: len(pack.tokens), reverse=True)
    for start in range(0, len(packs), batch_size):
        batch = packs[start : start + batch_size]
        for number, score in _score_batch(*parts, batch, requests):
            scores[number] = score
        advance(sum(len(pack.requests) for pack in batch))
    return scores


def _packs(requests: Sequence[Request]) -> Iterator[_Pack]:
    same_context: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(requests):
        same_context.setdefault(tuple(context), []).append(number)
    for context, numbers in same_context.items():
        length = len(context)
        pack = _Pack(list(context), list(range(length)), [0] * length, numbers, [])
        for branch, number in enumerate(numbers, 1):
            fed = requests[number][1][:-1]
            first = len(pack.tokens)
            pack.sources.append([length - 1, *range(first, first + len(fed))])
            pack.tokens.extend(fed)
            pack.positions.extend(range(length, length + len(fed)))
            pack.branches.extend([branch] * len(fed))
        yield pack


def _score_batch(
    decoder: Any, head: Any, batch: Sequence[_Pack], requests: Sequence[Request]
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Yield the number and the score of each request of a batch."""
    outputs = _predictions(decoder, batch)  # [P, D]
    numbers = [number for pack in batch for number in pack.requests]
    targets = torch.tensor([token for number in numbers for token in requests[number][1]], device=outputs.device)
    log_likelihoods, hits = [], []
    for chunk, target in zip(outputs.split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS), strict=True):
        logits = head(chunk).float()  # [p, V]
        chosen = logits.gather(1, target[:, None])[:, 0]
        log_likelihoods.append((chosen - logits.logsumexp(1)).cpu().double())
        hits.append((logits.argmax(1) == target).cpu())
    per_token, hit = torch.cat(log_likelihoods), torch.cat(hits)
    ends = list(accumulate(len(requests[number][1]) for number in numbers))
    for number, start, end in zip(numbers, [0, *ends], ends, strict=False):
        yield number, (float(per_token[start:end].sum()), bool(hit[start:end].all()))


def _predictions(decoder: Any, batch: Sequence[_Pack]) -> Tensor:
    """Return the decoder's outputs that predict the continuations' tokens, request by request, [P, D]."""
    width = max(len(pack.tokens) for pack in batch)
    tokens, positions, branches = (
        torch.tensor([values + [fill] * (width - len(values)) for values in rows], device=decoder.device)  # [B, T]
        for rows, fill in (
            ([pack.tokens for pack in batch], 0),
            ([pack.positions for pack in batch], 0),
            ([pack.branches for pack in batch], _PADDING),
        )
    )
    of_context = branches[:, None, :] == 0
    seen = (of_context | (branches[:, None, :] == branches[:, :, None])).tril()  # [B, T, T]
    mask = torch.zeros(seen.shape, dtype=decoder.dtype, device=decoder.device)
    mask = mask.masked_fill(~seen, torch.finfo(decoder.dtype).min)[:, None]  # [B, 1, T, T]
    hidden = decoder(
        input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state  # [B, T, D]
    places = [(row, place) for row, pack in enumerate(batch) for source in pack.sources for place in source]
    rows, columns = torch.tensor(places, device=decoder.device).unbind(1)
    return hidden[rows, columns]
