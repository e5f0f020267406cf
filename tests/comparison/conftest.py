"""Fixtures of the comparison's tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from intraslice.cli.app import main
from support.small_comparison import run_here, write_yaml


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run jobs in this process, and return the list of those that were run."""
    return run_here(monkeypatch)


@pytest.fixture(scope="session")
def finished_folder(
    tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Run the small comparison once; return its folder (read only) and its jobs."""
    folder = tmp_path_factory.mktemp("finished")
    file = write_yaml(folder / "small.yaml", tiny_folder("llama"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        jobs = run_here(monkeypatch)
        assert main(["compare", str(file), "-o", str(folder / "out")]) == 0
    yield folder / "out", jobs


@pytest.fixture
def finished(finished_folder: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> Path:
    """Return a copy of the small comparison that a test may go on with."""
    return Path(shutil.copytree(finished_folder[0], tmp_path / "out"))


@pytest.fixture
def small(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function (**changes) -> YAML file of the small comparison."""
    return lambda **changes: write_yaml(tmp_path / "small.yaml", tiny_folder("llama"), **changes)
