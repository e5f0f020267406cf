"""What is known of zero-shot tasks without lm-eval: their local data, as JSON lines with the field names of the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from intraslice.border import parse_json
from intraslice.errors import TaskError

DEFAULT_BATCH_SIZE = 16
"""Examples of a task that are scored at a time."""

Row = dict[str, Any]
_Check = tuple[str, Callable[[Any, Row], bool]]
"""What a field has to be, in words, and a test of its value in its row."""


def _labels(row: Row) -> list[str]:
    return row["choices"]["label"] if _are_choices(row.get("choices")) else []


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)


def _are_choices(value: Any) -> bool:
    if not isinstance(value, dict) or not all(_are_texts(value.get(key)) for key in ("text", "label")):
        return False
    return len(value["text"]) == len(value["label"])


def _one_of(*values: Any) -> _Check:
    # True and 1.0 equal 1, but are not what the hub holds.
    return f"one of {', '.join(map(repr, values))}", lambda value, _: any(
        value == wanted and type(value) is type(wanted) for wanted in values
    )


_TEXT: _Check = ("a text", lambda value, _: isinstance(value, str))
_ANSWER: _Check = ("a text that is not empty", lambda value, _: isinstance(value, str) and value != "")
_CHOICES: _Check = ('{"text": [...], "label": [...]} of one length', lambda value, _: _are_choices(value))
_KEY: _Check = ("one of choices.label", lambda value, row: value in _labels(row))
# The definition of openbookqa strips the key, those of ARC do not.
_LOOSE_KEY: _Check = (_KEY[0], lambda value, row: isinstance(value, str) and value.lstrip() in _labels(row))
_ARC = {"question": _TEXT, "choices": _CHOICES, "answerKey": _KEY}
_ENDINGS: _Check = ("a list of texts", lambda value, _: _are_texts(value))
_ENDING: _Check = (
    "the number of an ending, as a text",
    lambda value, row: isinstance(row["endings"], list) and value in [str(n) for n in range(len(row["endings"]))],
)
_BLANK: _Check = ("a text with the blank '_'", lambda value, _: isinstance(value, str) and "_" in value)

FIELDS: Mapping[str, Mapping[str, _Check]] = {
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "piqa": {"goal": _TEXT, "sol1": _ANSWER, "sol2": _ANSWER, "label": _one_of(0, 1)},
    "winogrande": {"sentence": _BLANK, "option1": _ANSWER, "option2": _ANSWER, "answer": _one_of("1", "2")},
    "openbookqa": {"question_stem": _TEXT, "choices": _CHOICES, "answerKey": _LOOSE_KEY},
    "boolq": {"passage": _TEXT, "question": _TEXT, "label": _one_of(0, 1)},
    "hellaswag": {"activity_label": _TEXT, "ctx_a": _TEXT, "ctx_b": _TEXT, "endings": _ENDINGS, "label": _ENDING},
}
"""The tasks that can be read from local files, and the fields that their official definitions use."""


def task_score(acc: float, acc_norm: float | None) -> float:
    """Return what the paper reports, and averages are made of: acc_norm where the task has it, else acc."""
    return acc if acc_norm is None else acc_norm


def task_file(folder: Path, task: str) -> Path:
    """Return the file of a task in a folder of task data."""
    return folder / f"{task}.jsonl"


def check_files(folder: Path, tasks: Iterable[str]) -> None:
    """Refuse a folder that does not hold a file for each task.

    Raises:
        TaskError: the folder or a file is missing.
    """
    if not folder.is_dir():
        raise TaskError(f"there is no folder of task data {str(folder)!r}; give one that holds <task>.jsonl files.")
    for task in tasks:
        if not task_file(folder, task).is_file():
            present = sorted(path.stem for path in folder.glob("*.jsonl"))
            raise TaskError(
                f"{str(folder)!r} has no file {task}.jsonl; it has data for {', '.join(present) or 'no task'}."
            )


def read_rows(folder: Path, task: str) -> list[Row]:
    """Read the examples of a task, with only the fields that its definition uses.

    Raises:
        TaskError: a line is not JSON, or a field of it is missing or not what it has to be.
    """
    path = task_file(folder, task)
    fields = FIELDS[task]
    rows: list[Row] = []
    try:
        # Split as a file is read: str.splitlines would also cut at separators that are allowed within JSON strings.
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_checked(line, f"line {number} of {str(path)!r}", task))
    except UnicodeDecodeError as error:
        raise TaskError(f"task data {str(path)!r} is not UTF-8 (byte {error.start}).") from error
    except OSError as error:
        raise TaskError(f"task data {str(path)!r} cannot be read: {error.strerror or error}.") from error
    if not rows:
        raise TaskError(f"task data {str(path)!r} holds no examples; each line is one, with {', '.join(fields)}.")
    return rows


def _checked(line: str, where: str, task: str) -> Row:
    row = parse_json(line, where, TaskError)
    if not isinstance(row, dict):
        raise TaskError(f"{where} is not a JSON object.")
    fields = FIELDS[task]
    for field in fields:
        if field not in row:
            raise TaskError(f"{where} has no field {field!r}; {task} needs {', '.join(fields)}.")
    for field, (wanted, is_valid) in fields.items():
        if not is_valid(row[field], row):
            raise TaskError(f"{where}: {field!r} has to be {wanted}, not {json.dumps(row[field])[:80]}.")
    return {field: row[field] for field in fields}


def fingerprint(folder: Path, tasks: Iterable[str]) -> str:
    """Return a sha256 over the names and files of the tasks; their order does not matter."""
    digest = hashlib.sha256()
    for task in sorted(tasks):
        content = task_file(folder, task).read_bytes()
        digest.update(f"{task} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
