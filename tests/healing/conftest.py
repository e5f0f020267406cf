"""A tiny pruned model, its dense model and a text, shared by the tests of healing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intraslice.healing.options import HealOptions
from intraslice.healing.run import HealResult, heal_checkpoint
from support.prune import prune
from support.text import WORDS


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number}. {WORDS}" for number in range(100)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pruned_folder(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function (family, **overrides) -> folder of a pruned model, shared by calls: read only."""
    made: dict[str, Path] = {}

    def get(family: str = "llama", method: str = "intraslice", sparsity: float = 0.4, **overrides: Any) -> Path:
        key = f"{family} {method} {sparsity} {sorted(overrides.items(), key=str)}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("pruned") / "out"
            prune(tiny_folder(family, **overrides), made[key], method, sparsity)
        return made[key]

    return get


@pytest.fixture(scope="session")
def small(text: Path) -> Callable[..., HealOptions]:
    """Return a function (**settings) -> settings of a healing of 12 steps, measured every fourth."""

    def options(**settings: Any) -> HealOptions:
        given = {
            "budget": "1536",
            "calibration": str(text),
            "seqlen": 32,
            "batch_size": 4,
            "held_out": 4,
            "evaluate_every": 4,
            "lr": 1e-3,
        }
        return HealOptions(**{**given, **settings})

    return options


@pytest.fixture
def heal(small: Callable[..., HealOptions], tmp_path: Path) -> Callable[..., HealResult]:
    """Return a function (folder, **settings) -> result of a small healing into `tmp_path / "healed"`."""

    def run(folder: Path, *, output: Path | None = None, **settings: Any) -> HealResult:
        names = ("teacher", "revision", "overwrite", "resume", "progress", "command")
        own = {name: settings.pop(name) for name in names if name in settings}
        return heal_checkpoint(str(folder), output or tmp_path / "healed", small(**settings), **own)

    return run
