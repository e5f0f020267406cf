"""The only file that imports lm-eval: its task definitions, prompts and scoring, with our forward pass and progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.tasks
from datasets.exceptions import DatasetsError
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from intraslice.errors import CalibrationError, NumericalError, TaskError, nearest, one_line
from intraslice.evaluation.likelihood import can_pack, score_continuations
from intraslice.evaluation.task_data import Row
from intraslice.progress import Progress
from intraslice.quiet import quiet

VERSION = version("lm-eval")

# Where the definitions of the usual tasks are; indexing all of the harness's 13,000 tasks takes many seconds.
_FOLDERS = ("arc", "piqa", "winogrande", "openbookqa", "super_glue/boolq", "hellaswag")
_SCORED_BY_LIKELIHOOD = ("multiple_choice", "loglikelihood")
_LOCAL_SPLIT = "local"
_METRICS = ("acc", "acc_norm")


def load_tasks(names: Sequence[str], local: Mapping[str, list[Row]] | None) -> dict[str, Any]:
    """Build lm-eval's tasks by its official definitions.

    Args:
        names: of tasks.
        local: examples by task, to use instead of the data sets on the hub; everything else stays official.

    Raises:
        TaskError: a task is unknown or not scored by accuracy, or the hub cannot be reached.
    """
    with _quiet_harness():
        manager = _manager(names)
        for name in names:
            if name not in manager.all_subtasks:
                _refuse_name(name, manager)
        if local is not None:
            # A group may override any field of its tasks.
            members = [{"task": name, **_local_overrides(local[name])} for name in names]
            tasks = manager.load({"group": "local", "task": members})["tasks"]
        else:
            tasks = _load_from_hub(manager, names)
    for name, task in tasks.items():
        if task.OUTPUT_TYPE not in _SCORED_BY_LIKELIHOOD or "acc" not in task.aggregation():
            raise TaskError(
                f"task {name!r} is not scored by accuracy over given answers ({task.OUTPUT_TYPE}; "
                f"{', '.join(task.aggregation())}); run it with lm-eval itself on the saved model."
            )
        # The harness asks for this where a definition leaves the number of examples in the prompt open.
        task.set_config(key="num_fewshot", value=0)
    return dict(tasks)


def _manager(names: Sequence[str]) -> Any:
    root = Path(str(lm_eval.tasks.__file__)).parent
    manager = lm_eval.tasks.TaskManager(include_path=[root / folder for folder in _FOLDERS], include_defaults=False)
    return manager if set(names) <= set(manager.all_subtasks) else lm_eval.tasks.TaskManager()


def _refuse_name(name: str, manager: Any) -> None:
    if name in manager.all_tasks:
        raise TaskError(f"{name!r} is a group of tasks of lm-eval; name its tasks one by one.")
    raise TaskError(
        f"task {name!r} is unknown to lm-eval {VERSION}; `lm-eval ls subtasks` lists its tasks."
        + nearest(name, manager.all_subtasks)
    )


def _local_overrides(rows: list[Row]) -> dict[str, Any]:
    return {
        "custom_dataset": partial(_local_dataset, rows),
        "test_split": _LOCAL_SPLIT,
        # These would supply the examples of prompts with examples.
        "training_split": None,
        "validation_split": None,
        "fewshot_split": None,
    }


def _local_dataset(rows: list[Row], **_: Any) -> datasets.DatasetDict:
    return datasets.DatasetDict({_LOCAL_SPLIT: datasets.Dataset.from_list(rows)})


def _load_from_hub(manager: Any, names: Sequence[str]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for name in names:
        try:
            tasks |= manager.load([name])["tasks"]
        # RuntimeError and ValueError are how `datasets` says that nothing is cached or a format is too old.
        except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
            reason = one_line(error)[:200]
            raise TaskError(
                f"the data of task {name!r} cannot be loaded from the hub: {reason}; without a network use "
                f"--task-data with a folder that holds {name}.jsonl."
            ) from error
    return tasks


def run_tasks(
    tasks: Mapping[str, Any],
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    limit: int | None,
    batch_size: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Score a model; returns what lm-eval reports by task, with metric names like "acc" and "acc_stderr", and under
    "answers" the numbers of the single examples by metric.

    Raises:
        NumericalError: the model's outputs are not finite.
        CalibrationError: the tokenizer does not belong to the model.
        TaskError: an answer is longer than the positions of the model.
    """
    with _quiet_harness():
        harness = _Harness(model, tokenizer, batch_size, progress)
        found: Any = evaluate(harness, {"tasks": dict(tasks)}, limit=limit, log_samples=True)
    results: dict[str, dict[str, Any]] = {}
    for name in tasks:
        # Keys are "acc,none": the metric and the filter of the answers.
        metrics = {key.partition(",")[0]: value for key, value in found["results"][name].items()}
        answers = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        results[name] = {
            **metrics,
            "samples": found["n-samples"][name]["effective"],
            "answers": {metric: [sample[metric] for sample in answers if metric in sample] for metric in _METRICS},
        }
    return results


# Its registration hides the class from type checkers.
_Base: Any = HFLM


class _Harness(_Base):
    """lm-eval's own wrapper of a model, which shares contexts where that gives the same numbers."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_size: int, progress: Progress):
        # Half precision would round log likelihoods of tens of nats to steps of 0.1 and more.
        super().__init__(
            pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32"
        )
        self._progress = progress

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None) -> Any:
        pairs = [(self._fitting(context, continuation), continuation) for _, context, continuation in requests]
        _check_tokens(pairs, self.config.vocab_size)
        with self._progress.step("zero-shot tasks", len(pairs)) as advance:
            if can_pack(self.model, pairs):
                scores = score_continuations(self.model, pairs, batch_size=int(self.batch_size), advance=advance)
            else:
                self.cache_hook = _AnswerHook(advance)
                scores = super()._loglikelihood_tokens(requests, disable_tqdm=True)
        if any(math.isnan(log_likelihood) for log_likelihood, _ in scores):
            raise NumericalError("the model's outputs are not finite; try --dtype float32 or bfloat16.")
        return scores

    def _fitting(self, context: list[int], continuation: list[int]) -> list[int]:
        """Return the end of the context that fits, as lm-eval cuts it; the last token of all is not fed."""
        space = self.max_length + 1 - len(continuation)
        if space < 1:
            raise TaskError(
                f"an answer of {len(continuation)} tokens is beyond the {self.max_length} positions of the model."
            )
        return context[-space:]


class _AnswerHook:
    """Counts the answers where lm-eval would store them; its own progress bar cannot be replaced otherwise."""

    def __init__(self, advance: Callable[[int], None]):
        self._advance = advance

    def add_partial(self, *_: Any) -> None:
        self._advance(1)


def _check_tokens(pairs: Sequence[tuple[list[int], list[int]]], vocab_size: int) -> None:
    largest = max(max((*context, *continuation)) for context, continuation in pairs)
    if largest >= vocab_size:
        raise CalibrationError(
            f"token id {largest} is outside the vocabulary of {vocab_size}; the tokenizer does not belong to the model."
        )


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep the logs and the progress bars of lm-eval and of what it loads data with off the screen."""
    module: Any = lm_eval.api.task
    without_bars, bar = datasets.are_progress_bars_disabled(), module.tqdm
    datasets.disable_progress_bars()
    # Building the prompts has no switch for its bar.
    module.tqdm = lambda items, **_: items
    try:
        with quiet("lm_eval", "datasets", "huggingface_hub"):
            yield
    finally:
        module.tqdm = bar
        if not without_bars:
            datasets.enable_progress_bars()
