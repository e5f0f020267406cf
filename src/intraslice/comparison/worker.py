"""The child process that does one job of a comparison: identify, prune, measure or analyze."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from intraslice import __version__
from intraslice.checkpoint.source import open_checkpoint
from intraslice.comparison.cells import (
    ANALYSIS,
    DIVERGENCE,
    PERPLEXITY,
    RANK,
    TASK,
    TEXT,
    Facts,
    TextFacts,
    calibration_name,
    digest,
)
from intraslice.comparison.spec import Evaluation
from intraslice.data.calibration import SHIPPED_CHARS_PER_TOKEN
from intraslice.data.mixture import is_sampled, parse_source, share_out
from intraslice.data.sampling import SAMPLING_VERSION
from intraslice.data.text import SAMPLED, load_text
from intraslice.data.windows import token_stream
from intraslice.errors import ComparisonError
from intraslice.evaluation.domains import measure_divergence
from intraslice.evaluation.perplexity import check_windows, measure_perplexity
from intraslice.evaluation.text_choice import TextChoice
from intraslice.healing.options import HealOptions
from intraslice.inspection import inspect_model
from intraslice.loading import load_model
from intraslice.options import CalibrationOptions
from intraslice.placement import choose_device
from intraslice.process import Parent
from intraslice.pruning import calibrate, check_seqlen, prune_recipe
from intraslice.recipes.recipe import recipe_from_dict

ANALYSIS_TOKENS = 1 << 15
"""Tokens of the evaluation text that spectra and ranks are estimated on."""


def serve(requests: Iterator[dict[str, Any]], parent: Parent) -> None:
    """Do each job that is asked for.

    Args:
        requests: "job" names a function of this module, the rest are its arguments.
        parent: takes the results.

    Raises:
        IntraSliceError: a job failed.
    """
    for job in requests:
        arguments = {name: value for name, value in job.items() if name != "job"}
        try:
            result = _JOBS[job["job"]](parent, **arguments)
        except (MemoryError, torch.OutOfMemoryError):
            raise ComparisonError("not enough memory.") from None
        except OSError as error:
            raise ComparisonError(str(error)) from error
        parent.done(result)


def _identify(
    parent: Parent,
    models: list[str],
    calibrations: list[dict[str, Any]],
    evaluation: dict[str, Any],
    tasks: dict[str, Any] | None,
    healings: list[dict[str, Any]],
    device: str,
) -> dict[str, Any]:
    """Find everything that keys are made of; whatever is wrong with models, texts and healing shows here."""
    _check_healings(healings)
    asked = Evaluation(**evaluation)
    choices = asked.choices()
    contents = [load_text(choice.source, split="test", text_field=asked.text_field) for choice in choices]
    wanted = [CalibrationOptions(**calibration) for calibration in calibrations]
    facts = {
        model: asdict(_model_facts(model, wanted, choices, contents, asked.seqlen, device, parent)) for model in models
    }
    versions = {} if tasks is None else {"lm_eval": version("lm_eval")}
    data = {} if tasks is None else _task_data(tasks)
    return {
        "facts": facts,
        "texts": asdict(
            TextFacts(
                evaluation=digest(contents[0]),
                calibration=_text_fingerprint(wanted[0]),
                texts={choice.name: digest(text) for choice, text in zip(choices[1:], contents[1:], strict=True)},
                **data,
            )
        ),
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


def _check_healings(healings: list[dict[str, Any]]) -> None:
    """Refuse a healing that cannot run here before anything is pruned for it."""
    if healings:
        # Here, because it imports the Trainer.
        from intraslice.healing.run import check_here

        for options in healings:
            check_here(HealOptions(**options))


def _model_facts(
    model: str,
    calibrations: list[CalibrationOptions],
    choices: list[TextChoice],
    contents: list[str],
    seqlen: int,
    device: str,
    parent: Parent,
) -> Facts:
    checkpoint = open_checkpoint(model, progress=parent)
    tokenizer = checkpoint.load_tokenizer()
    for choice, text in zip(choices, contents, strict=True):
        check_windows(checkpoint.config, token_stream(text, tokenizer), seqlen, choice.windows, first=choice.first)
    fingerprint = checkpoint.fingerprint()
    found: dict[str, str] = {}
    for calibration in calibrations:
        if is_sampled(calibration.source):
            check_seqlen(checkpoint.config, calibration.seqlen)
            # Sampling takes minutes; model, settings and texts decide the tokens as well as their hash would.
            decides = {"self": fingerprint, "sampling": SAMPLING_VERSION, "texts": _text_fingerprint(calibration)}
            found[calibration_name(calibration)] = digest({**decides, **asdict(calibration)})
            continue
        tokens = calibrate(checkpoint, calibration, device=device, progress=parent)
        found[calibration_name(calibration)] = tokens.fingerprint
    folder = str(checkpoint.folder)
    info = inspect_model(folder).to_dict()
    return Facts(folder=folder, fingerprint=fingerprint, info=info, calibrations=found)


def _text_fingerprint(calibration: CalibrationOptions) -> str | None:
    parts = parse_source(calibration.source)
    texts = {}
    for part, count in zip(parts, share_out(parts, calibration.num_samples), strict=True):
        if count and part.source not in SAMPLED:
            enough = SHIPPED_CHARS_PER_TOKEN * count * calibration.seqlen
            texts[part.source] = digest(load_text(part.source, text_field=calibration.text_field, min_chars=enough))
    if len(parts) == 1:
        return texts.get(parts[0].source)
    return digest(list(texts.values())) if texts else None


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


def _prune(parent: Parent, recipe: dict[str, Any], command: str) -> dict[str, Any]:
    """Prune, going on where an interrupted run of the same cell stopped."""
    wanted = recipe_from_dict(recipe)
    # The folder is named by what decides its content: an unreadable rest in it is ours to replace.
    return prune_recipe(wanted, resume=True, overwrite=True, command=command, progress=parent).to_dict()


def _heal(
    parent: Parent, folder: str, output: str, options: dict[str, Any], dense: str, command: str
) -> dict[str, Any]:
    """Heal a pruned model, going on where an interrupted run of the same cell stopped; return the record."""
    from intraslice.healing.run import heal_checkpoint

    shared: dict[str, Any] = {"resume": True, "overwrite": True, "command": command, "progress": parent}
    found = heal_checkpoint(folder, Path(output), HealOptions(**options), teacher=dense, **shared)
    return found.record.to_dict()


def _measure(
    parent: Parent,
    folder: str,
    device: str,
    parts: list[str],
    evaluation: dict[str, Any],
    tasks: dict[str, Any] | None,
    dense: str,
) -> None:
    """Load a model once (and the dense one, where it is compared with) and send each measurement when it is done."""
    asked = Evaluation(**evaluation)
    model, tokenizer = load_model(folder, dtype=asked.dtype, device=device)
    choices = {choice.name: choice for choice in asked.choices()}
    dense_model: Any = None
    for part in parts:
        if part == PERPLEXITY or part.startswith((TEXT, DIVERGENCE)):
            name = part.removeprefix(TEXT).removeprefix(DIVERGENCE)
            choice = next(iter(choices.values())) if part == PERPLEXITY else choices[name]
            text = load_text(choice.source, split="test", text_field=asked.text_field)
            chosen: dict[str, Any] = {"seqlen": asked.seqlen, "windows": choice.windows, "first": choice.first}
            tokens = token_stream(text, tokenizer)
            if part.startswith(DIVERGENCE):
                if dense_model is None:
                    dense_model, _ = load_model(dense, dtype=asked.dtype, device=device)
                found = measure_divergence(model, dense_model, tokens, **chosen, progress=parent)
                measured = {"kl": found.kl, "agreement": found.agreement}
            else:
                measured = measure_perplexity(model, tokens, **chosen, progress=parent).to_dict()
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
                progress=parent,
            ).to_dict()
        parent.part(part, measured)


def _analyze(parent: Parent, folder: str, device: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Measure the spectra of a dense model."""
    from intraslice.streaming.analysis import analyze_model

    checkpoint = open_checkpoint(folder)
    tokens = _analysis_tokens(evaluation, checkpoint.load_tokenizer())
    return analyze_model(checkpoint, tokens, device=device, progress=parent)


def _evaluation_tokens(evaluation: dict[str, Any], tokenizer: Any) -> torch.Tensor:
    asked = Evaluation(**evaluation)
    choice = asked.choices()[0]
    tokens = token_stream(load_text(choice.source, split="test", text_field=asked.text_field), tokenizer)
    return tokens[choice.first * asked.seqlen :]


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
    "heal": _heal,
    "measure": _measure,
    ANALYSIS: _analyze,
}
