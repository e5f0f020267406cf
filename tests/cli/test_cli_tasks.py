from __future__ import annotations

import json
from pathlib import Path

import pytest

from intraslice.cli.app import main
from support.task_rows import ROWS, write_tasks


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "data", {"piqa": ROWS["piqa"], "boolq": ROWS["boolq"][:1]})


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capfd.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def refusal(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    status, out, err = call(capfd, "eval", *arguments)
    assert (status, out) == (2, "")
    (line,) = (line for line in err.splitlines() if line.strip())
    assert line.startswith("error: ")
    return line


def test_table_and_json(capfd, tiny_folder, data: Path):
    arguments = ("eval", tiny_folder("llama"), "--tasks", "piqa,boolq", "--task-data", data)
    status, table, progress = call(capfd, *arguments)
    assert status == 0
    # Off a terminal a step is one line, and nothing of lm-eval comes with it.
    assert [line.split(":")[0] for line in progress.splitlines() if line.strip()] == ["zero-shot tasks"]
    status, out, _ = call(capfd, *arguments, "--json", "--batch-size", "1")
    result = json.loads(out)
    assert status == 0
    assert list(result["tasks"]) == ["piqa", "boolq"]
    assert set(result["tasks"]["piqa"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "samples", "answers"}
    assert (result["num_fewshot"], result["limit"], len(result["data"])) == (0, None, 64)
    piqa, boolq = result["tasks"]["piqa"], result["tasks"]["boolq"]
    assert boolq["acc_norm"] is None and boolq["acc_stderr"] is None
    assert result["average"] == pytest.approx((piqa["acc_norm"] + boolq["acc"]) / 2)
    rows = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert f"{100 * piqa['acc']:.2f} \u00b1 {100 * piqa['acc_stderr']:.2f}" in rows["piqa"]
    assert rows["average"].split()[-1] == f"{100 * result['average']:.2f}"


def test_limit(capfd, tiny_folder, data: Path):
    arguments = ("--tasks", "piqa", "--task-data", data, "--limit", 1, "--json")
    _, out, _ = call(capfd, "eval", tiny_folder("llama"), *arguments)
    assert json.loads(out)["tasks"]["piqa"]["samples"] == 1


def test_refusals(capfd, tmp_path: Path, data: Path):
    # No model is there: each of these is found before one is looked for.
    local = ("m", "--task-data", data, "--tasks")
    assert "Did you mean 'piqa'?" in refusal(capfd, *local, "pika")
    assert "hellaswag.jsonl" in refusal(capfd, *local, "piqa,hellaswag")
    assert "limit must be at least 1" in refusal(capfd, *local, "piqa", "--limit", "0")
    assert "batch_size must be at least 1" in refusal(capfd, *local, "piqa", "--batch-size", "-2")
    assert "no task is named" in refusal(capfd, *local, ",")
    assert "no folder" in refusal(capfd, "m", "--tasks", "piqa", "--task-data", tmp_path / "none")
    with open(data / "piqa.jsonl", "a") as file:
        file.write("{}\n")
    assert "line 3" in refusal(capfd, *local, "piqa")


def test_options_of_the_other_measurement(capfd, data: Path):
    assert "--windows belongs to the perplexity" in refusal(capfd, "m", "--tasks", "piqa", "--windows", "3")
    assert "name them with --tasks" in refusal(capfd, "m", "--task-data", data)


def test_the_default_of_the_help_is_that_of_the_code():
    import inspect

    from intraslice.cli.evaluate import evaluate
    from intraslice.evaluation.tasks import DEFAULT_BATCH_SIZE

    assert inspect.signature(evaluate).parameters["batch_size"].default == DEFAULT_BATCH_SIZE
