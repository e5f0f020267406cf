"""The tokenizer of a model folder: what stands in its files is a stranger's, and is tried before it is relied on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from intraslice.border import MAX_SECONDS, foreign, in_time, is_number
from intraslice.errors import CheckpointError
from intraslice.quiet import no_words_of_compiled_code, quiet

MAX_TOKENIZER_BYTES = 1 << 28
"""Each file of a tokenizer is at most this large; those of the largest vocabularies have some 30 MB."""
_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "*.model",
    "tekken.json",
)
_PROBE = "The probe: 3 + 4 = 7.\n"


def open_tokenizer(folder: Path, name: str, config: Any, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model folder, which has been seen to work on a short text.

    Args:
        folder: of a dense or pruned model.
        name: how messages call the model.
        config: of the model, so that config.json is not read again behind our back.
        trust_remote_code: whether code that comes with the tokenizer may run.

    Raises:
        CheckpointError: there is none, it cannot be read or used, or it needs code that was not allowed.
    """
    from transformers import AutoTokenizer

    for path in (path for pattern in _FILES for path in folder.glob(pattern)):
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(
                f"{path.name!r} of {name!r} is larger than {MAX_TOKENIZER_BYTES} bytes, and no tokenizer needs to be"
            )
    with foreign(f"the tokenizer of {name!r} is missing or cannot be read", CheckpointError), quiet("transformers"):
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trust_remote_code)
        if not is_number(tokenizer.model_max_length):
            raise ValueError(f"model_max_length is {tokenizer.model_max_length!r}")
        with no_words_of_compiled_code():
            ids = in_time(lambda: tokenizer(_PROBE)["input_ids"], MAX_SECONDS, "a short text", CheckpointError)
        if not all(isinstance(token, int) and token >= 0 for token in ids):
            raise ValueError(f"it makes {ids} of a text")
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            if not (token is None or isinstance(token, int)):
                raise ValueError(f"{token!r} is no token id")
        if not all(isinstance(token, int) for token in (len(tokenizer), *tokenizer.all_special_ids)):
            raise ValueError(f"its special tokens are {tokenizer.all_special_ids}")
    return tokenizer
