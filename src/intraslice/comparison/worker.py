"""A child process that does one job of a comparison: identify, prune, measure or analyse.

The parent writes one JSON object to standard input and keeps it open; replies are JSON objects, one a line. When
standard input ends, the parent is gone, and so is this process: nobody else may write into the same folder.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from intraslice import __version__
from intraslice.checkpoint.source import open_checkpoint
from intraslice.comparison.cells import ANALYSIS, PERPLEXITY, RANK, TASK, Facts, TextFacts, calibration_name, digest
from intraslice.data.calibration import BUILT_IN_CHARS_PER_TOKEN
from intraslice.data.text import SELF, load_text
from intraslice.errors import IntraSliceError, one_line
from intraslice.evaluation.perplexity import check_windows, measure_perplexity, tokenize
from intraslice.inspection import inspect_model
from intraslice.loading import load_model
from intraslice.options import CalibrationOptions
from intraslice.placement import choose_device
from intraslice.pruning import calibrate, check_seqlen, prune_recipe
from intraslice.recipes.recipe import Recipe

ANALYSIS_TOKENS = 1 << 15
"""Tokens of the evaluation text that spectra and ranks are estimated on."""

Reply = Callable[..., None]


class _PipeProgress:
    """Progress that the parent shows."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._depth = 0

    @contextmanager
    def step(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        depth, self._depth = self._depth, self._depth + 1
        self._reply("step", description=description, total=total)
        try:
            yield lambda units: self._reply("advance", depth=depth, units=units)
        finally:
            self._depth -= 1
            self._reply("close")

    def note(self, message: str) -> None:
        self._reply("note", message=message)


def main() -> None:
    """Do the job that standard input names."""
    # Libraries that print must not end up in the protocol: file descriptor 1 becomes standard error.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def reply(kind: str, **content: Any) -> None:
            replies.write(json.dumps({"kind": kind, **content}) + "\n")

        job = json.loads(sys.stdin.readline())
        threading.Thread(target=_end_with_parent, daemon=True).start()
        do_job(job, reply)


def do_job(job: dict[str, Any], reply: Reply) -> None:
    """Do a job and send its result, or the sentence of its error."""
    arguments = {name: value for name, value in job.items() if name != "job"}
    try:
        reply("done", result=_JOBS[job["job"]](reply, _PipeProgress(reply), **arguments))
    except (IntraSliceError, MemoryError, torch.OutOfMemoryError, OSError) as error:
        short_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        reply("error", sentence="not enough memory." if short_of_memory else one_line(error))


def _end_with_parent() -> None:
    # Not through sys.stdin, whose lock would be held when the interpreter ends.
    while os.read(0, 1):
        pass
    os._exit(1)


def _identify(
    reply: Reply,
    progress: _PipeProgress,
    models: list[str],
    calibrations: list[dict[str, Any]],
    evaluation: dict[str, Any],
    tasks: dict[str, Any] | None,
    device: str,
) -> dict[str, Any]:
    """Find everything that keys are made of; whatever is wrong with models and texts shows here."""
    text = load_text(evaluation["text"], split="test", text_field=evaluation["text_field"])
    wanted = [CalibrationOptions(**calibration) for calibration in calibrations]
    facts = {model: asdict(_model_facts(model, wanted, text, evaluation, device, progress)) for model in models}
    versions = {} if tasks is None else {"lm_eval": version("lm_eval")}
    data = {} if tasks is None else _task_data(tasks)
    return {
        "facts": facts,
        "texts": asdict(TextFacts(evaluation=digest(text), calibration=_text_fingerprint(wanted[0]), **data)),
        "machine": {
            "machine": f"{_processor()}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(),
            "device": choose_device(device).type,
        },
        "versions": {
            "intraslice": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            **versions,
        },
    }


def _model_facts(
    model: str,
    calibrations: list[CalibrationOptions],
    text: str,
    evaluation: dict[str, Any],
    device: str,
    progress: _PipeProgress,
) -> Facts:
    checkpoint = open_checkpoint(model, progress=progress)
    tokenizer = checkpoint.load_tokenizer()
    check_windows(checkpoint.config, tokenize(text, tokenizer), evaluation["seqlen"], evaluation["windows"])
    fingerprint = checkpoint.fingerprint()
    found: dict[str, str] = {}
    for calibration in calibrations:
        if calibration.source == SELF:
            check_seqlen(checkpoint.config, calibration.seqlen)
            # Sampling takes minutes; the model and the settings decide the tokens as well as their hash would.
            found[calibration_name(calibration)] = digest({"self": fingerprint, **asdict(calibration)})
            continue
        tokens = calibrate(checkpoint, calibration, device=device, progress=progress)
        found[calibration_name(calibration)] = tokens.fingerprint
    folder = str(checkpoint.folder)
    info = inspect_model(folder).to_dict()
    return Facts(folder=folder, fingerprint=fingerprint, info=info, calibrations=found)


def _text_fingerprint(calibration: CalibrationOptions) -> str | None:
    if calibration.source == SELF:
        return None
    enough = BUILT_IN_CHARS_PER_TOKEN * calibration.num_samples * calibration.seqlen
    return digest(load_text(calibration.source, text_field=calibration.text_field, min_chars=enough))


def _task_data(tasks: dict[str, Any]) -> dict[str, Any]:
    """Read definitions and data of all tasks, and return their fingerprints."""
    from intraslice.evaluation.tasks import open_tasks

    folder = None if tasks["task_data"] is None else Path(tasks["task_data"])
    each = {name: open_tasks([name], folder).data for name in tasks["names"]}
    return {"tasks": open_tasks(tasks["names"], folder).data, "each_task": each}


def _processor() -> str:
    # platform.processor() is empty on most Linux systems.
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _prune(reply: Reply, progress: _PipeProgress, recipe: dict[str, Any], command: str) -> dict[str, Any]:
    """Prune, going on where an interrupted run of the same cell stopped."""
    wanted = Recipe.model_validate(recipe)
    # The folder is named by what decides its content: an unreadable rest in it is ours to replace.
    return prune_recipe(wanted, resume=True, overwrite=True, command=command, progress=progress).to_dict()


def _measure(
    reply: Reply,
    progress: _PipeProgress,
    folder: str,
    device: str,
    parts: list[str],
    evaluation: dict[str, Any],
    tasks: dict[str, Any] | None,
) -> None:
    """Load a model once and send each measurement when it is done."""
    model, tokenizer = load_model(folder, dtype=evaluation["dtype"], device=device)
    for part in parts:
        if part == PERPLEXITY:
            tokens = _evaluation_tokens(evaluation, tokenizer)
            windows, seqlen = evaluation["windows"], evaluation["seqlen"]
            measured = measure_perplexity(model, tokens, seqlen=seqlen, windows=windows, progress=progress).to_dict()
        elif part == RANK:
            from intraslice.streaming.analysis import effective_ranks

            measured = effective_ranks(model, _analysis_tokens(evaluation, tokenizer))
        else:
            from intraslice.evaluation.tasks import evaluate_tasks

            assert tasks is not None
            data = tasks["task_data"]
            measured = evaluate_tasks(
                model,
                tokenizer,
                [part.removeprefix(TASK)],
                task_data=None if data is None else Path(data),
                limit=tasks["limit"],
                batch_size=tasks["batch_size"],
                progress=progress,
            ).to_dict()
        reply("part", name=part, result=measured)


def _analyse(
    reply: Reply, progress: _PipeProgress, folder: str, device: str, evaluation: dict[str, Any]
) -> dict[str, Any]:
    """Measure the spectra of a dense model."""
    from intraslice.streaming.analysis import analyse_model

    tokenizer = open_checkpoint(folder).load_tokenizer()
    return analyse_model(folder, _analysis_tokens(evaluation, tokenizer), device=device, progress=progress)


def _evaluation_tokens(evaluation: dict[str, Any], tokenizer: Any) -> torch.Tensor:
    return tokenize(load_text(evaluation["text"], split="test", text_field=evaluation["text_field"]), tokenizer)


def _analysis_tokens(evaluation: dict[str, Any], tokenizer: Any) -> torch.Tensor:
    """Return windows of the evaluation text, int64 [N, T]."""
    seqlen = evaluation["seqlen"]
    tokens = _evaluation_tokens(evaluation, tokenizer)
    most = max(1, min(evaluation["windows"] or tokens.numel(), ANALYSIS_TOKENS // seqlen))
    windows = min(most, tokens.numel() // seqlen)
    return tokens[: windows * seqlen].view(windows, seqlen)


_JOBS: dict[str, Callable[..., Any]] = {
    "identify": _identify,
    "prune": _prune,
    "measure": _measure,
    ANALYSIS: _analyse,
}

if __name__ == "__main__":
    main()
