"""The document of a comparison: what comparison.json holds, and tables and report read. Plain JSON types."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from intraslice.comparison.cells import (
    DIVERGENCE,
    HEAL,
    PERPLEXITY,
    PRUNE,
    RANK,
    SPEED,
    TASK,
    TEXT,
    Facts,
    TextFacts,
    Work,
    calibration_name,
)
from intraslice.comparison.spec import ComparisonSpec
from intraslice.data.mixture import short_source
from intraslice.evaluation.paired import differences
from intraslice.evaluation.task_data import task_score
from intraslice.report.document import DENSE, FORMAT, HEALED
from intraslice.results.sites import site_errors

_SPEEDS = (
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "kv_cache_bytes_per_token",
    "peak_memory_bytes",
)


def build_cell(work: Work, parts: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """Return a finished cell.

    Args:
        work: the cell.
        parts: results by the name of the part.
        facts: of its model.
    """
    perplexity = _finite(parts[PERPLEXITY]["perplexity"])
    main, *others = work.texts
    texts = {main: perplexity, **{name: _finite(parts[TEXT + name]["perplexity"]) for name in others}}
    tasks = {
        name.removeprefix(TASK): result["tasks"][name.removeprefix(TASK)]
        for name, result in parts.items()
        if name.startswith(TASK)
    }
    scores = [task_score(task["acc"], task["acc_norm"]) for task in tasks.values()]
    return {
        **_names(work),
        **(_dense_fields(facts) if work.cell.recipe is None else pruned_fields(parts[PRUNE])),
        "perplexity": perplexity,
        "texts": texts if others else None,
        "divergence": {
            name.removeprefix(DIVERGENCE): result for name, result in parts.items() if name.startswith(DIVERGENCE)
        }
        or None,
        "tasks": tasks or None,
        "average": sum(scores) / len(scores) if scores else None,
        "speed": _speed(parts[SPEED]) if SPEED in parts else None,
        "effective_rank": parts.get(RANK),
        **(_healing_fields(parts[PRUNE], parts[HEAL]) if HEAL in parts else {}),
    }


def _healing_fields(pruned: Mapping[str, Any], healing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the curve, and what both together cost."""
    seconds = pruned["seconds"]
    total = seconds["total"] + healing["seconds"]
    peak = max(pruned["peak_memory_bytes"], healing["peak_memory_bytes"])
    return {
        "healing": healing["curve"],
        "prune": {
            "seconds": {**seconds, "healing": healing["seconds"], "total": total},
            "peak_memory_bytes": peak,
        },
    }


def _finite(value: float) -> float | None:
    # JSON knows no infinity.
    return value if math.isfinite(value) else None


def against_dense(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return cells with how far each one is from the dense model of the same name, as far as that was measured.

    The log gap ln(perplexity / dense perplexity) of each text and its mean, the mean KL divergence and agreement, and
    the difference of the accuracies with its paired standard error. The answers to single questions, which decide the
    last one, are left out of what is returned.
    """
    dense = {cell["model"]: cell for cell in cells if cell["method"] == DENSE}
    return _beside_healed([_against(cell, dense.get(cell["model"])) for cell in cells])


def _beside_healed(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return cells of which each has as `healed` what the cell of the same prune, healed, has reached."""

    def place(cell: Mapping[str, Any], label: str) -> tuple[Any, ...]:
        return cell["model"], label, cell["asked"]

    main = [cell for cell in cells if cell["sweep"] is None and not cell.get("error")]
    healed = {place(cell, cell["label"]): cell for cell in main if cell.get("healing")}
    for cell in main:
        found = healed.get(place(cell, cell["label"] + HEALED))
        if found is not None:
            cell["healed"] = {name: found.get(name) for name in ("perplexity", "mean_gap", "average")}
    return list(cells)


def _against(cell: Mapping[str, Any], dense: Mapping[str, Any] | None) -> dict[str, Any]:
    found = dict(cell)
    tasks = cell.get("tasks")
    if dense is not None and cell["method"] != DENSE:
        found["gaps"] = gaps = _gaps(cell.get("texts") or {}, dense.get("texts") or {})
        found["mean_gap"] = _mean(gaps.values())
        divergence = cell.get("divergence") or {}
        for name in ("kl", "agreement"):
            found[f"mean_{name}"] = _mean([one[name] for one in divergence.values()])
        if tasks and any("answers" in task for task in tasks.values()):
            paired = differences(_answers(tasks), _answers(dense.get("tasks") or {}))
            found["paired"] = None if paired is None else paired.to_dict()
    if tasks:
        found["tasks"] = {
            name: {field: value for field, value in task.items() if field != "answers"} for name, task in tasks.items()
        }
    return found


def _gaps(texts: Mapping[str, float | None], dense: Mapping[str, float | None]) -> dict[str, float | None]:
    pairs = {name: (value, dense.get(name)) for name, value in texts.items()}
    return {name: math.log(own / other) if own and other else None for name, (own, other) in pairs.items()}


def _mean(values: Iterable[float | None]) -> float | None:
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) / len(known) if known and len(known) == len(listed) else None


def _answers(tasks: Mapping[str, Any]) -> dict[str, str | None]:
    return {name: task.get("answers") for name, task in tasks.items()}


def failed_cell(work: Work, sentence: str) -> dict[str, Any]:
    """Return a cell that could not be made: every number is null, and `error` says why."""
    fields = ("sparsity", "parameters", "layer_parameters", "weight_bytes", "perplexity", "tasks", "average", "speed")
    empty = dict.fromkeys((*fields, "prune", "effective_rank"))
    return {**_names(work), **empty, "layers": [], "error": sentence}


def _names(work: Work) -> dict[str, Any]:
    cell = work.cell
    return {
        "key": work.key,
        "model": cell.name,
        "label": cell.shown_label,
        "method": cell.method,
        "options": cell.options,
        "sweep": cell.sweep,
        "asked": cell.asked,
    }


def pruned_fields(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the content of a result.json says about a cell."""
    return {
        "sparsity": result["sparsity"],
        "parameters": result["pruned_parameters"],
        "layer_parameters": result["pruned_layer_parameters"],
        "weight_bytes": result["pruned_bytes"],
        "prune": {"seconds": result["seconds"], "peak_memory_bytes": result["peak_memory_bytes"]},
        "layers": [_layer(layer) for layer in result["layers"]],
        **({"healing": result["healing"]["curve"]} if result.get("healing") else {}),
    }


def _dense_fields(facts: Facts) -> dict[str, Any]:
    info = facts.info
    return {
        "sparsity": 0.0,
        "parameters": info["num_parameters"],
        "layer_parameters": info["layer_parameters"],
        "weight_bytes": info["weight_bytes"],
        "prune": None,
        "layers": [_layer(layer) for layer in info["layers"]],
    }


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    shape = layer["shape"]
    return {
        "num_attention_heads": sum(shape["heads_per_kv"]),
        "num_key_value_heads": len(shape["heads_per_kv"]),
        **{name: shape[name] for name in ("qk_head_dim", "v_head_dim", "intermediate_size")},
        "num_parameters": layer["num_parameters"],
        "errors": site_errors(layer),
    }


def _speed(result: Mapping[str, Any]) -> dict[str, Any]:
    ratio = result["ratio"]
    return {
        **{name: result["model"][name] for name in _SPEEDS},
        "prefill_speedup": ratio.get("prefill_tokens_per_second", 1.0),
        "decode_speedup": ratio.get("decode_tokens_per_second", 1.0),
    }


def build_protocol(
    spec: ComparisonSpec,
    names: Mapping[str, str],
    facts: Mapping[str, Facts],
    texts: TextFacts,
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
    speed_options: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return how everything is measured; `models` and `tokens` hold fingerprints by the model's short name."""
    shared = spec.calibration
    tokens = {names[model]: found.calibrations[calibration_name(shared)] for model, found in facts.items()}
    evaluation = spec.evaluation
    tasks = None
    if spec.tasks is not None:
        tasks = {"names": spec.tasks.names, "limit": spec.tasks.limit, "data": texts.tasks}
        tasks["lm_eval"] = versions["lm_eval"]
    return {
        "calibration": {
            "source": short_source(shared.source),
            "num_samples": shared.num_samples,
            "seqlen": shared.seqlen,
            "seed": shared.seed,
            "fingerprint": texts.calibration,
            "tokens": tokens,
        },
        "text": {
            "name": _source_name(evaluation.choices()[0].source),
            "fingerprint": texts.evaluation,
            "seqlen": evaluation.seqlen,
            "windows": evaluation.windows,
            "dtype": evaluation.dtype,
        },
        "texts": [
            {
                "name": choice.name,
                "text": _source_name(choice.source),
                "fingerprint": fingerprint,
                "first": choice.first,
                "windows": choice.windows,
            }
            for choice, fingerprint in zip(evaluation.choices(), (texts.evaluation, *texts.texts.values()), strict=True)
        ]
        if evaluation.texts
        else None,
        "tasks": tasks,
        "heal": spec.heal,
        "speed": None
        if speed_options is None
        else {**speed_options, "device": machine["device"], "threads": machine["threads"]},
        "machine": machine["machine"],
        "versions": dict(versions),
        "models": {names[model]: found.fingerprint for model, found in facts.items()},
    }


def build_document(
    title: str, protocol: dict[str, Any], cells: Sequence[dict[str, Any]], analysis: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the whole document."""
    return {
        "format": FORMAT,
        "title": title,
        "created": date.today().isoformat(),
        "protocol": protocol,
        "cells": against_dense(cells),
        "analysis": dict(analysis),
    }


def _source_name(source: str) -> str:
    """Return the name of a text without the folders of this machine."""
    return Path(source).name
