"""A small comparison, and how its jobs are run in the process of the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from intraslice import process
from intraslice.comparison import run, worker
from intraslice.errors import ComparisonError

# An option is refused where a method does not read it, so this one is no option of all.
INTRASLICE = {"label": "intraslice", "method": "intraslice", "options": {"attention.head_multiple": 2}}
SMALL: dict[str, Any] = {
    "title": "Small",
    "methods": [INTRASLICE, {"label": "whole heads", "method": "naive"}],
    "sparsities": [0.2, 0.4],
    "calibration": {"source": "builtin", "num_samples": 4, "seqlen": 32},
    "evaluation": {"text": "builtin", "seqlen": 64, "windows": 2},
    "options": {"ffn.ffn_multiple": 1},
}


def write_yaml(path: Path, model: Path, **changes: Any) -> Path:
    """Write the small comparison of a model, with other or further fields."""
    path.write_text(yaml.safe_dump({"models": [str(model)], **SMALL, **changes}))
    return path


def run_here(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run jobs in this process, which has torch already; the returned list grows by each job."""
    jobs: list[dict[str, Any]] = []

    def run_job(job: dict[str, Any], progress: Any, keep: Any = None) -> Any:
        jobs.append(job)
        lines: list[str] = []
        process.answer(worker.serve, iter([job]), process.Parent(lines.append))
        return process.read_replies(lines, progress, ComparisonError, keep)

    monkeypatch.setattr(run, "run_job", run_job)
    return jobs


def document_of(folder: Path) -> dict[str, Any]:
    """Read comparison.json."""
    return json.loads((folder / "comparison.json").read_text())
