"""The tokenizer keys of a GGUF file: copied from a file of the same base model, or built from tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intraslice.border import foreign, read_json
from intraslice.checkpoint.gguf_header import read_header
from intraslice.checkpoint.pruned import PrunedCheckpoint
from intraslice.checkpoint.source import BUILT_IN, find_built_in
from intraslice.errors import CheckpointError
from intraslice.names import expanded
from intraslice.results.result import RESULT_FILE

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_BYTES_ONLY = ("ByteLevel", False, False)
_WORDS = ("ByteLevel", False, True)
# (steps of the pre-tokenizer, ignore_merges) -> what llama.cpp calls it. llama.cpp ties both to the name.
_PRE_TOKENIZERS: dict[tuple[tuple[Any, ...], bool], str] = {
    ((_WORDS,), False): "gpt-2",
    ((("Digits", True), _WORDS), False): "smollm",
    ((("Split", _LLAMA3), _BYTES_ONLY), True): "llama-bpe",
    ((("Split", _LLAMA3), _BYTES_ONLY), False): "dbrx",
    ((("Split", _QWEN2), _BYTES_ONLY), False): "qwen2",
    ((("Split", _TEKKEN), _BYTES_ONLY), True): "tekken",
}
_ADVICE = "give a GGUF file of the same base model with --tokenizer-from FILE"
# A SentencePiece tokenizer writes a space as this character.
_SPACE = "\u2581"


def add_vocabulary(writer: Any, checkpoint: PrunedCheckpoint, tokenizer_from: str | None, rows: int) -> str:
    """Add all `tokenizer.*` keys to a GGUF file that is not open yet.

    Args:
        writer: a gguf.GGUFWriter.
        checkpoint: whose tokenizer is wanted.
        tokenizer_from: a GGUF file to copy from; None: the file that the checkpoint was pruned from, if it is still
            there, else tokenizer.json.
        rows: of the embedding; llama.cpp wants a token for each.

    Returns:
        A sentence that says where the keys come from.

    Raises:
        CheckpointError: there is no tokenizer, or it is not one that can be expressed exactly.
    """
    source = expanded(tokenizer_from) if tokenizer_from else _pruned_from(checkpoint)
    if source is None:
        _add_from_folder(writer, checkpoint, rows)
        return "the tokenizer was built from tokenizer.json."
    _copy(writer, source, rows)
    return f"the tokenizer was copied from {source.name!r}."


def _pruned_from(checkpoint: PrunedCheckpoint) -> Path | None:
    path = checkpoint.folder / RESULT_FILE
    if not path.is_file():
        return None
    model = read_json(path, f"{RESULT_FILE} of {checkpoint.name!r}", CheckpointError).get("model")
    if not isinstance(model, str):
        return None
    if model in BUILT_IN:
        try:
            return find_built_in(model)
        except CheckpointError:
            # The package that ships it is gone; tokenizer.json is next.
            return None
    found = expanded(model)
    return found if found.suffix.lower() == ".gguf" and found.is_file() else None


def _copy(writer: Any, source: Path, rows: int) -> None:
    from gguf import GGUFReader, GGUFValueType

    if not source.is_file():
        raise CheckpointError(f"there is no file {str(source)!r} to copy the tokenizer from")
    read_header(source, str(source))
    with foreign(f"GGUF file {str(source)!r}, given for its tokenizer, is truncated or corrupt", CheckpointError):
        fields = GGUFReader(source).fields
        wanted = {key: field for key, field in fields.items() if key.startswith("tokenizer.")}
        values = {key: _value(field) for key, field in wanted.items()}
    count = len(values.get("tokenizer.ggml.tokens") or ())
    if count != rows:
        raise CheckpointError(
            f"the tokenizer of {str(source)!r} has {count} tokens, but the checkpoint has {rows}; {_ADVICE}"
        )
    for key, field in wanted.items():
        if values[key] == []:
            # The format cannot write an empty list, and its absence means the same.
            continue
        sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, values[key], field.types[0], sub_type)


def _value(field: Any) -> Any:
    from gguf import GGUFValueType

    if field.types[-1] != GGUFValueType.STRING:
        return field.contents()
    # Bytes as they are: a token may be cut out of the middle of a character.
    texts = [field.parts[index].tobytes() for index in field.data]
    return texts if field.types[0] == GGUFValueType.ARRAY else texts[0]


def _add_from_folder(writer: Any, checkpoint: PrunedCheckpoint, rows: int) -> None:
    from gguf import SpecialVocab

    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{checkpoint.name!r} has no tokenizer.json to build GGUF's tokenizer from; {_ADVICE}")
    data = read_json(path, f"tokenizer.json of {checkpoint.name!r}", CheckpointError)
    with foreign(f"the tokenizer of {checkpoint.name!r} cannot be read", CheckpointError, f"; {_ADVICE}"):
        model = data["model"]
        if model.get("type", "BPE") != "BPE":
            raise CheckpointError(f"tokenizer.json holds a {model['type']} tokenizer, not a BPE one; {_ADVICE}")
        prefix = _space_prefix(data) if model.get("byte_fallback") else None
        tokens, types = _tokens(data, rows)
        if prefix is None:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(_pre_tokenizer(data))
        else:
            writer.add_tokenizer_model("llama")
            writer.add_tokenizer_pre("default")
            writer.add_add_space_prefix(prefix)
            writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        special = SpecialVocab(checkpoint.folder, load_merges=prefix is None, n_vocab=rows)
        # llama.cpp would add a first token to some kinds of tokenizer of its own accord.
        special.add_special_token.setdefault("bos", False)
        special.add_to_gguf(writer, quiet=True)


def _tokens(data: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return the text and the GGUF type of each row of the embedding."""
    from gguf import TokenType

    model = data["model"]
    kinds: dict[int, tuple[str, int]] = {}
    for text, index in model["vocab"].items():
        is_byte = model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kind = TokenType.BYTE if is_byte else TokenType.NORMAL
        kinds[index] = (text, TokenType.UNKNOWN if text == model.get("unk_token") else kind)
    for token in data.get("added_tokens") or ():
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        if token["content"] == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        kinds[token["id"]] = (token["content"], kind)
    if kinds and max(kinds) >= rows:
        raise CheckpointError(
            f"the tokenizer has {max(kinds) + 1} tokens, but the checkpoint only {rows}; the format has no place for "
            "tokens without an embedding"
        )
    filled = [kinds.get(index, (f"[PAD{index}]", TokenType.UNUSED)) for index in range(rows)]
    return [text for text, _ in filled], [int(kind) for _, kind in filled]


def _steps(part: dict[str, Any] | None, children: str) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for child in part[children]:
            yield from _steps(child, children)
    else:
        yield part


def _pre_tokenizer(data: dict[str, Any]) -> str:
    """Return llama.cpp's name of the pre-tokenizer."""
    normalizers = {step["type"] for step in _steps(data.get("normalizer"), "normalizers")}
    steps: list[tuple[Any, ...]] = []
    for step in _steps(data.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "ByteLevel":
            steps.append(("ByteLevel", step.get("add_prefix_space", True), step.get("use_regex", True)))
        elif step["type"] == "Digits":
            steps.append(("Digits", step.get("individual_digits", False)))
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
            steps.append(("Split", step["pattern"].get("Regex")))
        else:
            steps.append((step["type"],))
    name = _PRE_TOKENIZERS.get((tuple(steps), bool(data["model"].get("ignore_merges"))))
    # llama.cpp leaves out the composition of characters too, whatever the base model.
    if name is None or normalizers - {"NFC"}:
        shown = " + ".join(str(step[0]) for step in steps) or "nothing"
        raise CheckpointError(f"the pre-tokenizer of tokenizer.json ({shown}) is not one with a known name; {_ADVICE}")
    return name


def _space_prefix(data: dict[str, Any]) -> bool:
    """Return whether a SentencePiece-like tokenizer puts a space before the text.

    Raises:
        CheckpointError: the tokenizer does something else to its text.
    """
    marks = False
    prefix = False
    others: set[str] = set()
    for step in _steps(data.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE:
            marks = True
        else:
            others.add(step["type"])
    for step in _steps(data.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == _SPACE:
            marks = True
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            prefix = scheme != "never"
        elif step["type"] == "Split" and step["pattern"] == {"String": " "} and marks:
            # As in Gemma's tokenizer: all spaces have been replaced by then.
            continue
        else:
            others.add(step["type"])
    if others or not marks:
        shown = ", ".join(sorted(others)) or "no mark for spaces"
        raise CheckpointError(f"the tokenizer with byte fallback is not like SentencePiece ({shown}); {_ADVICE}")
    return prefix


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Return a score for each token that makes llama.cpp join pieces in the order of the merges.

    llama.cpp joins the neighbours whose union has the highest score, so all merges to one token must stand together.
    """
    rank: dict[str, int] = {}
    last = ""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        joined = left + right
        if joined != last and joined in rank:
            raise CheckpointError(f"the merges of tokenizer.json are not in the order of SentencePiece; {_ADVICE}")
        rank.setdefault(joined, len(rank))
        last = joined
    lowest = -float(len(rank) + 1)
    return [-float(rank[token]) if token in rank else lowest for token in tokens]
