from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intraslice.errors import TaskError
from intraslice.evaluation.task_data import FIELDS
from intraslice.evaluation.tasks import open_tasks
from support.task_rows import write_tasks

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tasks"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "data")


def test_the_fingerprint_is_that_of_the_files(data: Path, tmp_path: Path):
    both = open_tasks(["piqa", "boolq"], data).data
    assert open_tasks(["boolq", "piqa"], data).data == both
    assert open_tasks(["piqa"], data).data != both
    assert open_tasks(["piqa", "boolq"], write_tasks(tmp_path / "copy")).data == both
    with open(data / "boolq.jsonl", "a") as file:
        file.write("\n")
    assert open_tasks(["piqa", "boolq"], data).data != both


def edited(data: Path, task: str, change: Callable[[list[str]], list[str]]) -> list[str]:
    path = data / f"{task}.jsonl"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    return [task]


def without(field: str) -> Callable[[list[str]], list[str]]:
    def change(lines: list[str]) -> list[str]:
        last = {key: value for key, value in json.loads(lines[-1]).items() if key != field}
        return [*lines[:-1], json.dumps(last)]

    return change


def with_value(field: str, value: Any) -> Callable[[list[str]], list[str]]:
    return lambda lines: [json.dumps({**json.loads(lines[0]), field: value}), *lines[1:]]


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("piqa", without("sol2"), r"line 2 of '.*piqa.jsonl' has no field 'sol2'; piqa needs goal, sol1, sol2, label"),
        ("piqa", lambda lines: [lines[0], "{"], r"line 2 of '.*piqa.jsonl' is not JSON"),
        ("piqa", lambda lines: ["[1]"], r"line 1 of '.*piqa.jsonl' is not a JSON object"),
        ("piqa", lambda lines: ["", " "], r"piqa.jsonl' holds no examples"),
        ("piqa", with_value("label", -1), r"line 1 of .*'label' has to be one of 0, 1, not -1"),
        ("boolq", with_value("label", True), r"'label' has to be one of 0, 1, not true"),
        ("piqa", with_value("sol1", ""), r"'sol1' has to be a text that is not empty"),
        ("winogrande", with_value("answer", 1), r"'answer' has to be one of '1', '2', not 1"),
        ("winogrande", with_value("sentence", "no gap"), r"'sentence' has to be a text with the blank '_'"),
        ("arc_easy", with_value("answerKey", "E"), r"'answerKey' has to be one of choices.label"),
        ("arc_easy", with_value("choices", {"text": ["a"], "label": ["A", "B"]}), r"'choices' has to be"),
        ("openbookqa", with_value("choices", ["a"]), r"'choices' has to be"),
        ("hellaswag", with_value("label", 0), r"'label' has to be the number of an ending, as a text, not 0"),
        ("hellaswag", with_value("endings", "a"), r"'endings' has to be a list of texts"),
    ],
)
def test_wrong_lines(data: Path, task: str, change: Any, message: str):
    with pytest.raises(TaskError, match=message):
        open_tasks(edited(data, task, change), data)


def test_not_utf8(data: Path):
    (data / "piqa.jsonl").write_bytes(b'{"goal": "\xff"}')
    with pytest.raises(TaskError, match="not UTF-8"):
        open_tasks(["piqa"], data)


def test_missing_files(data: Path):
    (data / "piqa.jsonl").unlink()
    with pytest.raises(TaskError, match=r"has no file piqa.jsonl; it has data for arc_challenge, arc_easy, boolq"):
        open_tasks(["boolq", "piqa"], data)
    with pytest.raises(TaskError, match="no folder of task data"):
        open_tasks(["piqa"], data / "none")
    with pytest.raises(TaskError, match=r"no local form of task 'arc_esy'.*Did you mean 'arc_easy'\?"):
        open_tasks(["arc_esy"], data)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data of the five tasks in ../shared")
def test_the_whole_data_of_five_tasks():
    sizes = {"arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500, "piqa": 1838, "winogrande": 1267}
    opened = open_tasks(list(sizes), SHARED)
    assert {name: len(task.eval_docs) for name, task in opened.tasks.items()} == sizes
    assert set(sizes) < set(FIELDS)
