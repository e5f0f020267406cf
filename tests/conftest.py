"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Before transformers and datasets are imported: a test must never reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

from support.refusal import Refused, refusal
from support.tiny import make_tiny, tiny_tokenizer

# Two threads gain nothing on models this small, and one makes every number repeatable.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTRASLICE_CACHE", str(tmp_path_factory.getbasetemp() / "intraslice-cache"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function (family, **overrides) -> folder of a saved model, shared by calls: read only."""
    made: dict[str, Path] = {}

    def get(family: str, **overrides: object) -> Path:
        key = f"{family} {sorted(overrides.items(), key=str)}"
        if key not in made:
            made[key] = make_tiny(family, tmp_path_factory.mktemp(family), **overrides)  # type: ignore[arg-type]
        return made[key]

    return get


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function (family, **overrides) -> folder of a saved model that the test may change."""

    def make(family: str, **overrides: object) -> Path:
        return make_tiny(family, tmp_path / f"model-{family}", **overrides)  # type: ignore[arg-type]

    return make


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Return a function that runs a command which must be refused, and returns its one line on standard error."""
    return partial(refusal, capfd)


@pytest.fixture(scope="session")
def tokenizer():
    """Return the byte tokenizer of the tiny models."""
    return tiny_tokenizer()
