"""Text by name or path: data sets of the hub, local files, and a text that every Python brings along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intraslice.border import foreign, parse_json
from intraslice.data.encoding import as_conversation
from intraslice.data.shipped import SHIPPED
from intraslice.errors import CalibrationError, MissingExtraError, nearest, one_line
from intraslice.names import expanded
from intraslice.progress import Progress

SELF = "self"
START = "start"
SELF_KINDS = (START, "prose", "dialogue", "questions", "code", "mathematics", "lists", "chat")
"""What "self" samples; "self-" and one of them samples only this."""
SAMPLED = (SELF, *(f"{SELF}-{kind}" for kind in SELF_KINDS))
FILE_TYPES = (".txt", ".jsonl", ".parquet")
# A tokenizer holds a whole text several times over; no calibration or evaluation needs more than this.
MAX_CHARS = 1 << 24
# To judge a model on; to calibrate on, as much as is asked for.
_STREAMED_CHARS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class HubText:
    """Where a data set of the hub has its text.

    Attributes:
        path: id of the data set.
        config: its configuration, if it has several.
        column: the column with the text, or with the messages of a conversation.
        joiner: what to put between rows.
        splits: the names of "train" and "test" text in this data set.
        data_files: file pattern of a split, for data sets without a usable configuration.
        revision: branch, if not the main one.
        streamed: too large to be fetched whole: rows are read one by one, until there are enough.
    """

    path: str
    config: str | None = None
    column: str = "text"
    joiner: str = "\n\n"
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    data_files: dict[str, str] | None = None
    revision: str | None = None
    streamed: bool = False


HUB_TEXTS = {
    "wikitext2": HubText(path="Salesforce/wikitext", config="wikitext-2-raw-v1"),
    "c4": HubText(
        path="allenai/c4",
        joiner=" ",
        splits={"train": "train", "test": "validation"},
        data_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    # The main branch holds a loading script, which `datasets` no longer runs; the hub keeps this conversion.
    "ptb": HubText(
        path="ptb-text-only/ptb_text_only",
        column="sentence",
        joiner=" ",
        data_files={
            "train": "penn_treebank/train/*.parquet",
            "test": "penn_treebank/test/*.parquet",
        },
        revision="refs/convert/parquet",
    ),
    "alpaca": HubText(path="tatsu-lab/alpaca", splits={"train": "train", "test": "train"}),
    "fineweb-edu": HubText(
        path="HuggingFaceFW/fineweb-edu",
        config="sample-10BT",
        splits={"train": "train", "test": "train"},
        streamed=True,
    ),
    "ultrachat": HubText(
        path="HuggingFaceH4/ultrachat_200k",
        column="messages",
        splits={"train": "train_sft", "test": "test_sft"},
        streamed=True,
    ),
    "codeparrot": HubText(
        path="codeparrot/codeparrot-clean-valid",
        column="content",
        splits={"train": "train", "test": "train"},
        streamed=True,
    ),
    "finemath": HubText(
        path="HuggingFaceTB/finemath",
        config="finemath-4plus",
        splits={"train": "train", "test": "train"},
        streamed=True,
    ),
}


NAMED_TEXTS = (*SHIPPED, *SAMPLED, *HUB_TEXTS)
"""Names of texts."""


def check_text(source: str, names: Sequence[str] = NAMED_TEXTS) -> None:
    """Refuse an unknown name or a missing file, without reading anything.

    Args:
        source: name or path of one text.
        names: what it may be called, for the message.

    Raises:
        CalibrationError: `source` is neither a known name nor a text file.
    """
    if source in NAMED_TEXTS:
        return
    path = expanded(source)
    if path.is_file():
        if path.suffix.lower() not in FILE_TYPES:
            raise CalibrationError(f"text file {source!r} is not of a known type; use one of {', '.join(FILE_TYPES)}")
        return
    if path.is_dir():
        raise CalibrationError(f"{source!r} is a folder; give one text file ({', '.join(FILE_TYPES)})")
    if path.suffix.lower() in FILE_TYPES or len(path.parts) > 1:
        raise CalibrationError(f"there is no text file {source!r}")
    raise CalibrationError(
        f"text {source!r} is unknown; use {', '.join(names)} or a file ({', '.join(FILE_TYPES)})."
        + nearest(source, names)
    )


def load_text(
    source: str,
    *,
    split: str = "train",
    text_field: str | None = None,
    min_chars: int = 0,
    progress: Progress | None = None,
    tokenizer: Any = None,
) -> str:
    """Return one long text.

    Args:
        source: "builtin", the name of a data set, or a .txt, .jsonl or .parquet file.
        split: "train" or "test"; only data sets have both.
        text_field: column of a .jsonl or .parquet file; by default "text", or the only column of strings.
        min_chars: how much is needed; texts that ship with Python grow up to it, and so do
            those that are streamed from the hub (a few million characters unless given); others ignore it.
        progress: where a cut of a very long text is reported.
        tokenizer: writes conversations with its chat template, if it has one; as "role: words" without.

    Raises:
        CalibrationError: unknown name, missing, unreadable or empty text.
        MissingExtraError: `datasets` or `pyarrow` is not installed.
    """
    check_text(source)
    if source in SAMPLED:
        raise CalibrationError(f"{source!r} is sampled from a model and is no text by itself; use it to calibrate")
    if source in HUB_TEXTS:
        documents = _hub_documents(source, split, min_chars or _STREAMED_CHARS, tokenizer)
        joiner = HUB_TEXTS[source].joiner
    elif source in SHIPPED:
        documents, joiner = SHIPPED[source](min_chars), "\n\n"
    else:
        documents, joiner = _file_documents(expanded(source), text_field), "\n\n"
    text, whole = _join(documents, joiner)
    if not text.strip():
        raise CalibrationError(f"text {source!r} is empty")
    if not whole and progress is not None:
        progress.note(f"Only the first {MAX_CHARS} characters of {source!r} are used")
    return text


def _join(documents: Iterator[str], joiner: str) -> tuple[str, bool]:
    kept: list[str] = []
    size = 0
    for document in documents:
        kept.append(document)
        size += len(document) + len(joiner)
        if size > MAX_CHARS:
            return joiner.join(kept)[:MAX_CHARS], False
    return joiner.join(kept), True


def _hub_documents(name: str, split: str, enough: int, tokenizer: Any) -> Iterator[str]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise MissingExtraError(f"text {name!r} needs the package datasets: pip install 'intraslice[data]'") from error
    source = HUB_TEXTS[name]
    wanted = source.splits[split]
    arguments: dict[str, Any] = {"split": wanted, "revision": source.revision}
    if source.streamed:
        arguments["streaming"] = True
    if source.data_files:
        arguments["data_files"] = {wanted: source.data_files[wanted]}
    try:
        rows = datasets.load_dataset(source.path, source.config, **arguments)
        size = 0
        for row in rows:
            document = _as_text(row[source.column], tokenizer)  # type: ignore[index]
            size += len(document)
            yield document
            if source.streamed and size >= enough:
                return
    # RuntimeError and ValueError are how `datasets` says that nothing is cached or a format is too old.
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        reason = one_line(error)[:200]
        raise CalibrationError(
            f"data set {name!r} ({source.path}) cannot be loaded: {reason}; without a network use "
            "'builtin', 'self' or a local file"
        ) from error


def _as_text(content: Any, tokenizer: Any) -> str:
    """Return a text as it is, and a conversation as the model sees it."""
    if isinstance(content, str):
        return content
    if tokenizer is not None and tokenizer.chat_template:
        return as_conversation(content, tokenizer)
    return "\n".join(f"{said['role']}: {said['content']}" for said in content)


def _file_documents(path: Path, text_field: str | None) -> Iterator[str]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".txt":
            with open(path, encoding="utf-8-sig") as file:
                yield file.read(MAX_CHARS + 1)
        elif suffix == ".jsonl":
            yield from _json_lines(path, text_field)
        else:
            yield from _parquet_rows(path, text_field)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"text file {str(path)!r} is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise CalibrationError(f"text file {str(path)!r} cannot be read: {error.strerror or error}") from error


def _json_lines(path: Path, text_field: str | None) -> Iterator[str]:
    column = text_field
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = parse_json(line, f"line {number} of {str(path)!r}", CalibrationError)
            if not isinstance(row, dict):
                raise CalibrationError(f"line {number} of {str(path)!r} is not a JSON object")
            if column is None:
                strings = [key for key, value in row.items() if isinstance(value, str)]
                column = _choose_column(strings, path)
            if not isinstance(row.get(column), str):
                raise CalibrationError(
                    f"line {number} of {str(path)!r} has no text in {column!r}; it has {', '.join(row) or 'nothing'}"
                )
            yield row[column]


def _parquet_rows(path: Path, text_field: str | None) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(
            "reading .parquet files needs the package pyarrow: pip install 'intraslice[data]'"
        ) from error
    with foreign(f"text file {str(path)!r} is not a parquet file", CalibrationError):
        with parquet.ParquetFile(path) as file:
            strings = [
                column.name
                for column in file.schema_arrow
                if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
            ]
            if text_field is not None and text_field not in strings:
                raise CalibrationError(
                    f"{str(path)!r} has no text column {text_field!r}; it has {', '.join(strings) or 'none'}"
                )
            column = text_field or _choose_column(strings, path)
            for batch in file.iter_batches(columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _choose_column(strings: list[str], path: Path) -> str:
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    found = ", ".join(strings) or "none"
    raise CalibrationError(
        f"{str(path)!r} has no column 'text' and not exactly one other text column ({found}); name one with text_field"
    )
