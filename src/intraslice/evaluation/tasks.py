"""Zero-shot accuracy: lm-eval's official task definitions, on its hub data or on local files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from intraslice.errors import MissingExtraError, RecipeError, TaskError, nearest
from intraslice.evaluation.paired import Differences, differences
from intraslice.evaluation.task_data import (
    DEFAULT_BATCH_SIZE,
    FIELDS,
    check_files,
    fingerprint,
    read_rows,
    task_score,
)
from intraslice.progress import Progress, SilentProgress

HUB = "hub"


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Accuracy on one task.

    Attributes:
        acc: share of the examples whose right answer has the highest log likelihood.
        acc_stderr: its standard error; None for a single example.
        acc_norm: the same with log likelihoods divided by the length of the answers in characters; None where the
            definition of the task has no such metric.
        acc_norm_stderr: its standard error.
        samples: examples.
        answers: "1" for each example that `reported` counts as right, "0" for the others, in the order of the data;
            None where they are counted in parts.
    """

    acc: float
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    samples: int
    answers: str | None = None

    @property
    def reported(self) -> float:
        """The metric that the paper reports (its tables 5, 9 and 10): acc_norm where the task has it, else acc."""
        return task_score(self.acc, self.acc_norm)


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """Accuracy on several tasks.

    Attributes:
        tasks: by name, in the order they were asked for.
        average: plain mean of `TaskScore.reported`, as in the paper.
        data: "hub", or a sha256 over the local files of the tasks.
        lm_eval: version of lm-eval.
        limit: at most this many examples of each task were used, from the start; None means all.
        seconds: wall-clock seconds from the prompts to the scores.
        num_fewshot: solved examples in the prompts.
    """

    tasks: dict[str, TaskScore]
    average: float
    data: str
    lm_eval: str
    limit: int | None
    seconds: float
    num_fewshot: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """A model and the dense one on the same questions.

    Attributes:
        model: results of the model.
        dense: results of the dense model.
        differences: accuracy of the model minus that of the dense one, with paired standard errors; None where single
            answers are not known.
    """

    model: TaskResults
    dense: TaskResults
    differences: Differences | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def compare_answers(model: TaskResults, dense: TaskResults) -> Differences | None:
    """Return the differences of two results on the same questions."""
    return differences(
        {name: score.answers for name, score in model.tasks.items()},
        {name: score.answers for name, score in dense.tasks.items()},
    )


@dataclass(frozen=True, kw_only=True)
class TaskSet:
    """Tasks that are ready to be scored.

    Attributes:
        tasks: lm-eval's tasks by name.
        data: as in `TaskResults`.
    """

    tasks: dict[str, Any]
    data: str


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_data: Path | None = None,
    limit: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: Progress | None = None,
) -> TaskResults:
    """Measure the zero-shot accuracy of a model.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the one that belongs to it.
        tasks: names of lm-eval; with `task_data` those of `task_data.FIELDS`.
        task_data: folder of <task>.jsonl files, with the field names of the hub; None loads the data sets of the hub.
        limit: use at most this many examples of each task, from the start; None uses all.
        batch_size: examples at a time.
        progress: shows the answers.

    Raises:
        TaskError: a task or its data is unknown, missing or malformed.
        MissingExtraError: lm-eval is not installed.
        RecipeError: limit or batch_size is out of range.
        NumericalError: the model's outputs are not finite.
    """
    check_range(limit, batch_size)
    return score_tasks(
        model, tokenizer, open_tasks(tasks, task_data), limit=limit, batch_size=batch_size, progress=progress
    )


def check_range(limit: int | None, batch_size: int) -> None:
    """Refuse a limit or batch size that is not positive."""
    if limit is not None and limit < 1:
        raise RecipeError(f"limit must be at least 1, got {limit}.")
    if batch_size < 1:
        raise RecipeError(f"batch_size must be at least 1, got {batch_size}.")


def open_tasks(tasks: Sequence[str], task_data: Path | None = None) -> TaskSet:
    """Read the definitions and the data of tasks, before a model is loaded; see `evaluate_tasks`."""
    names = list(dict.fromkeys(tasks))
    if not names:
        raise TaskError(f"no task is named; the usual ones are {','.join(FIELDS)}.")
    if task_data is None:
        harness = _import_harness()
        return TaskSet(tasks=harness.load_tasks(names, None), data=HUB)
    for name in names:
        if name not in FIELDS:
            raise TaskError(
                f"there is no local form of task {name!r}; --task-data works for {', '.join(FIELDS)}."
                + nearest(name, FIELDS)
            )
    check_files(task_data, names)
    rows = {name: read_rows(task_data, name) for name in names}
    return TaskSet(tasks=_import_harness().load_tasks(names, rows), data=fingerprint(task_data, names))


def score_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: TaskSet,
    *,
    limit: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: Progress | None = None,
) -> TaskResults:
    """Score a model on opened tasks; see `evaluate_tasks`."""
    check_range(limit, batch_size)
    harness = _import_harness()
    start = time.perf_counter()
    found = harness.run_tasks(
        tasks.tasks, model, tokenizer, limit=limit, batch_size=batch_size, progress=progress or SilentProgress()
    )
    scores = {name: _score(metrics) for name, metrics in found.items()}
    return TaskResults(
        tasks=scores,
        average=sum(score.reported for score in scores.values()) / len(scores),
        data=tasks.data,
        lm_eval=harness.VERSION,
        limit=limit,
        seconds=time.perf_counter() - start,
    )


def _score(metrics: dict[str, Any]) -> TaskScore:
    # lm-eval writes "N/A" for the standard error of a single example.
    numbers = {key: value if isinstance(value, int | float) else None for key, value in metrics.items()}
    return TaskScore(
        acc=metrics["acc"],
        acc_stderr=numbers["acc_stderr"],
        acc_norm=numbers.get("acc_norm"),
        acc_norm_stderr=numbers.get("acc_norm_stderr"),
        samples=metrics["samples"],
        answers=_answers(metrics["answers"]["acc_norm"] or metrics["answers"]["acc"], metrics["samples"]),
    )


def _answers(values: Sequence[float], samples: int) -> str | None:
    whole = len(values) == samples and set(values) <= {0, 1}
    return "".join("1" if value else "0" for value in values) if whole else None


def _import_harness() -> Any:
    try:
        from intraslice.evaluation import harness
    except ImportError as error:
        raise MissingExtraError(
            f'zero-shot tasks need the package {error.name}: pip install "intraslice[eval]"'
        ) from error
    return harness
