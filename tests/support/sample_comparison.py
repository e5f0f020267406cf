"""A made-up comparison document with the shape and the sizes of a real one; the same call gives the same document."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

# Row name -> (perplexity / dense - 1 at 30 %, growth, decode speed-up at 30 %, seconds, uniform over layers).
METHODS = {
    "intraslice": (0.55, 3.4, 1.31, 348, False),
    "naive": (0.86, 3.5, 1.33, 330, False),
    "wanda-sp": (1.78, 5.5, 1.34, 61, True),
    "flap": (1.73, 7.2, 1.30, 66, False),
    "slimllm": (1.53, 5.8, 1.29, 118, False),
    "transact": (2.60, 6.0, 1.27, 190, True),
    "sobp": (0.79, 4.4, 1.31, 420, False),
    "slicegpt": (3.70, 4.2, 1.13, 95, True),
    "svd-llm": (4.20, 4.0, 1.05, 130, True),
}
SPARSITIES = (0.2, 0.3, 0.4, 0.5)
TASKS = {"arc_easy": 0.56, "arc_challenge": 0.29, "piqa": 0.67, "winogrande": 0.52, "openbookqa": 0.34}
FULL = {"num_attention_heads": 9, "num_key_value_heads": 3, "qk_head_dim": 64, "v_head_dim": 64}
HIDDEN, FFN, LAYERS = 576, 1536, 30
DENSE_LAYER = 106_168_320


def sample(
    models: Sequence[str] = ("smollm2-135m",),
    *,
    methods: Sequence[str] = tuple(METHODS),
    sparsities: Sequence[float] = SPARSITIES,
    layers: int = LAYERS,
    tasks: bool = True,
    speed: bool = True,
    ranks: bool = True,
    sweeps: bool = True,
    analysis: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Return a comparison document; the flags leave optional parts out."""
    draw = random.Random(seed)
    parts = {"tasks": tasks, "speed": speed, "ranks": ranks}
    cells = []
    for scale, model in enumerate(models, start=1):
        cells.append(_cell(draw, model, "dense", 0.0, layers, scale, **parts))
        cells += [_cell(draw, model, m, s, layers, scale, **parts) for m in methods for s in sparsities]
        if sweeps:
            cells += _sweep_cells(draw, model, layers, scale, parts)
    return {
        "format": 1,
        "title": "Structured pruning, side by side",
        "created": "2026-11-22",
        "protocol": {
            "calibration": {"name": "train-1mb.txt", "num_samples": 64, "seqlen": 1024, "seed": 0},
            "text": {"name": "wikitext2 test", "fingerprint": "5f1c09ab", "seqlen": 2048, "windows": 8},
            "tasks": {"names": list(TASKS), "limit": None, "data": "hub", "lm_eval": "0.4.13"} if tasks else None,
            "speed": {"prompt_tokens": 512, "decode_tokens": 64, "device": "cpu", "threads": 2} if speed else None,
            "machine": "2 virtual cores, 8 GB",
            "versions": {"intraslice": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        },
        "cells": cells,
        "analysis": {model: _analysis(draw, layers) for model in models} if analysis else {},
    }


def _cell(
    draw: random.Random,
    model: str,
    method: str,
    asked: float,
    layers: int,
    scale: int,
    *,
    tasks: bool,
    speed: bool,
    ranks: bool,
) -> dict[str, Any]:
    loss, growth, speedup, seconds, uniform = METHODS.get(method, (0.0, 1.0, 1.0, 0, True))
    ratio = 1 + loss * math.exp(growth * (asked - 0.3)) * draw.uniform(0.97, 1.03) if asked else 1.0
    perplexity = 19.26 / scale**0.5 * ratio
    sparsity = asked + draw.uniform(-2e-4, 2e-4) if asked else 0.0
    kept = round(DENSE_LAYER * scale * (1 - sparsity))
    scores = {name: _score(draw, base, ratio) for name, base in TASKS.items()}
    faster = 1 + (speedup - 1) * asked / 0.3
    return {
        "key": f"{model}/{method}/{asked}",
        "model": model,
        "label": method,
        "method": method,
        "options": {"run.matmul": "fast"} if asked else {},
        "sweep": None,
        "asked": asked,
        "sparsity": sparsity,
        "parameters": kept + 28_346_688,
        "layer_parameters": kept,
        "weight_bytes": 4 * (kept + 28_346_688),
        "perplexity": perplexity,
        "tasks": scores if tasks else None,
        "average": sum(s["acc_norm"] or s["acc"] for s in scores.values()) / len(scores) if tasks else None,
        "speed": _speed(faster, asked, scale) if speed else None,
        "prune": _prune(seconds, scale) if asked else None,
        "layers": [_layer(draw, i, layers, asked, uniform) for i in range(layers)],
        "effective_rank": [_rank(i, layers) / (1 + 0.25 * (ratio - 1) * (i / layers)) for i in range(layers)]
        if ranks
        else None,
    }


def _score(draw: random.Random, base: float, ratio: float) -> dict[str, Any]:
    floor = 0.25 if base < 0.5 else 0.5 if base > 0.6 else 0.49
    value = floor + max(base - floor, 0.02) / ratio**0.7 + draw.uniform(-0.01, 0.01)
    norm = None if base == TASKS["winogrande"] else value + 0.01
    return {
        "acc": value,
        "acc_stderr": 0.011,
        "acc_norm": norm,
        "acc_norm_stderr": None if norm is None else 0.012,
        "samples": 1000,
    }


def _speed(faster: float, asked: float, scale: int) -> dict[str, Any]:
    return {
        "prefill_tokens_per_second": 652.3 / scale * (1 + 1.5 * (faster - 1)),
        "decode_tokens_per_second": 20.6 / scale * faster,
        "kv_cache_bytes_per_token": 46080 * (1 - 0.5 * asked),
        "peak_memory_bytes": round(1.0459e9 * scale * (1 - 0.45 * asked)),
        "prefill_speedup": 1 + 1.5 * (faster - 1) if asked else 1.0,
        "decode_speedup": faster if asked else 1.0,
    }


def _prune(seconds: float, scale: int) -> dict[str, Any]:
    parts = {"allocation": 0.42 * seconds * scale, "layers": 0.55 * seconds * scale, "write": 0.9}
    return {
        "seconds": {**parts, "total": sum(parts.values()) + 1.2},
        "peak_memory_bytes": round((1.3e9 + 3e6 * seconds) * scale),
    }


def _layer(draw: random.Random, index: int, layers: int, asked: float, uniform: bool) -> dict[str, Any]:
    local = asked if uniform else min(0.9, asked * (0.4 + 1.2 * index / layers) * draw.uniform(0.8, 1.2))
    heads = max(1, round(9 * (1 - 0.6 * local)))
    error = 0.01 * math.exp(4 * local) * (1 + index / layers) * draw.uniform(0.8, 1.25)
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": math.ceil(heads / 3),
        "qk_head_dim": 64 - 8 * round(3 * local),
        "v_head_dim": 64 - 8 * round(3 * local),
        "intermediate_size": 8 * round(FFN * (1 - 1.05 * local) / 8),
        "num_parameters": round(DENSE_LAYER / layers * (1 - local)),
        "errors": {"attention": error, "ffn": 1.7 * error} if asked else {},
    }


def _rank(index: int, layers: int) -> float:
    x = index / max(1, layers - 1)
    return 240 * math.exp(-9 * x) + 4 + 70 * x**1.5


def _sweep_cells(
    draw: random.Random, model: str, layers: int, scale: int, parts: dict[str, bool]
) -> list[dict[str, Any]]:
    found = []
    for option, values in (
        ("calibration.num_samples", (8, 16, 32, 64, 128)),
        ("allocation.ffn_share", (0.9, 1.0, 1.1, 1.2, 1.3)),
    ):
        for value in values:
            cell = _cell(draw, model, "intraslice", 0.3, layers, scale, **parts)
            cell["sweep"] = {"option": option, "value": value}
            cell["options"][option] = value
            cell["key"] += f"/{option}={value}"
            cell["label"] = f"intraslice {option}={value}"
            worse = 0.6 / math.log2(value) if value > 4 else 2 * (value - 1.13) ** 2
            cell["perplexity"] *= 1 + worse
            found.append(cell)
    return found


def _spectrum(draw: random.Random, layers: int, count: int, decay: float) -> list[list[float]]:
    rows = []
    for index in range(layers):
        power = decay * (1.3 - 0.6 * index / layers) * draw.uniform(0.95, 1.05)
        values = [(1 + rank) ** -power for rank in range(count)]
        rows.append([value / sum(values) for value in values])
    return rows


def _analysis(draw: random.Random, layers: int) -> dict[str, Any]:
    kept = [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25]
    return {
        "context_spectrum": _spectrum(draw, layers, 64, 1.2),
        "act_spectrum": _spectrum(draw, layers, 64, 2.4),
        "residual_spectrum": _spectrum(draw, layers, 64, 3.2),
        "effective_rank": {
            "context": [12 + 9 * math.sin(i / 4) + draw.uniform(-1, 1) for i in range(layers)],
            "act": [220 + 15 * i + draw.uniform(-30, 30) for i in range(layers)],
            "attention_output": [40 + 2 * i + draw.uniform(-4, 4) for i in range(layers)],
            "ffn_output": [90 + i + draw.uniform(-8, 8) for i in range(layers)],
            "residual": [_rank(i, layers) for i in range(layers)],
        },
        "rope_pairs": {
            "kept_fraction": kept,
            "relative_error": [[0.45 * (1 - k) ** 1.7 * draw.uniform(0.6, 1.4) for k in kept] for _ in range(layers)],
        },
        "hidden_size": HIDDEN,
        "head_dim": 64,
        "intermediate_size": FFN,
        "num_tokens": 65536,
    }
