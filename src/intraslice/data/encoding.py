"""What a tokenizer makes of a text and of a conversation: asked for here, because its files may be a stranger's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from intraslice.border import MAX_SECONDS, foreign, in_time
from intraslice.errors import CalibrationError
from intraslice.quiet import no_words_of_compiled_code

_MIN_CHARS_PER_SECOND = 20_000
"""Of a long text; ordinary tokenizers take a hundred times as many."""


def encode(text: str, tokenizer: Any, *, special: bool = True) -> list[int]:
    """Return the token ids of a text.

    Args:
        text: it may be longer than the context of the model.
        tokenizer: the one of the model.
        special: whether the special tokens are added that the tokenizer adds by default.

    Raises:
        CalibrationError: the tokenizer cannot take the text, or not in time.
    """
    with foreign("the tokenizer cannot take this text", CalibrationError), no_words_of_compiled_code():
        # verbose=False: nothing to say about a text that is longer than the context.
        return in_time(
            lambda: tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"],
            MAX_SECONDS + len(text) / _MIN_CHARS_PER_SECOND,
            "the tokenizer with this text",
            CalibrationError,
        )


def as_conversation(said: Sequence[Any], tokenizer: Any, *, prompt: bool = False) -> str:
    """Return what is said as the text that the model sees.

    Args:
        said: what each side says, as `apply_chat_template` takes it.
        tokenizer: it has a chat template.
        prompt: end with what makes the model answer.

    Raises:
        CalibrationError: the chat template cannot take it, or not in `MAX_SECONDS`.
    """
    with foreign("the chat template of the tokenizer cannot be used", CalibrationError):
        text = in_time(
            lambda: tokenizer.apply_chat_template(said, add_generation_prompt=prompt, tokenize=False),
            MAX_SECONDS,
            "the chat template of the tokenizer",
            CalibrationError,
        )
        if not isinstance(text, str):
            raise TypeError(f"it makes {type(text).__name__} and no text")
        return text
