"""Long texts are handed to the tokenizer in pieces."""

from __future__ import annotations

import pytest
import torch

from intraslice.data import windows
from intraslice.data.windows import token_stream
from intraslice.errors import CalibrationError

TEXT = "Some words of a line,\nand some more words of it. " * 40


@pytest.mark.parametrize("text", [TEXT, "x" * 2000, "\n" * 2000])
def test_pieces_give_the_tokens_of_the_whole(text: str, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = token_stream(text, tokenizer)
    monkeypatch.setattr(windows, "PIECE_CHARS", 100)
    # Single bytes, so that no cut can be within a token.
    assert torch.equal(token_stream(text, tokenizer), whole)


def test_what_the_tokenizer_refuses_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: str, **_: object) -> None:
        raise Exception("no unknown token")

    with pytest.raises(CalibrationError, match="cannot take this text: no unknown token"):
        token_stream("x", broken)
