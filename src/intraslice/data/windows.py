"""A text as tokens, and what a window of it begins with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from intraslice.border import foreign
from intraslice.data.encoding import encode
from intraslice.errors import CalibrationError
from intraslice.runtime.families_intraslice import FAMILIES

PIECE_CHARS = 1 << 21
"""Characters that a tokenizer is handed at a time: it holds a text some fifty times over."""


def token_stream(text: str, tokenizer: Any) -> Tensor:
    """Return a text as one stream of tokens, with the special tokens that the tokenizer adds by default.

    A text of more than `PIECE_CHARS` is cut into pieces, at the ends of lines or words where there are any.

    Returns:
        int64 token ids, [N].

    Raises:
        CalibrationError: the tokenizer cannot take the text, or not in time.
    """
    with foreign("the tokenizer cannot take this text", CalibrationError):
        if len(text) <= PIECE_CHARS:
            return torch.tensor(encode(text, tokenizer), dtype=torch.int64)
        begin = encode("", tokenizer)[:1]
        streams = [begin if begin == [tokenizer.bos_token_id] else []]
        streams += [encode(part, tokenizer, special=False) for part in _pieces(text)]
        return torch.cat([torch.tensor(stream, dtype=torch.int64) for stream in streams])


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + PIECE_CHARS
        if end < len(text):
            # In the last half of the piece: a text may be one word.
            cuts = (text.rfind(mark, start + PIECE_CHARS // 2, end) for mark in ("\n", " "))
            end = next((cut for cut in cuts if cut > 0), end)
        yield text[start:end]
        start = end


def first_token(config: Any) -> int | None:
    """Return the token that every window must begin with, for models that are of no use without it; else None.

    Args:
        config: of a dense or pruned model.
    """
    spec = FAMILIES.get(str(config.model_type).removeprefix("intraslice_"))
    return config.bos_token_id if spec is not None and spec.starts_with_bos else None


def begin_windows(windows_NT: Tensor, token: int | None) -> Tensor:
    """Return the windows with this token in the place of their first one, int64 [N, T]; None changes nothing."""
    if token is None:
        return windows_NT
    windows = windows_NT.clone()
    windows[:, 0] = token
    return windows
