"""What benchmarks/fidelity.json holds: every method within 5 % of its authors' code, or better.

The rows are measured by `python benchmarks/fidelity.py --keep-in benchmarks/fidelity.json`, which takes hours; here
they are only read.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "fidelity.json").read_text())["rows"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fidelity", ROOT / "benchmarks" / "fidelity.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_is_a_method_as_its_authors_run_it(script: ModuleType):
    assert ROWS
    for row in ROWS:
        assert row["options"] == {}, "a preset is faithful without further settings"
        assert row["asked"] in script.AUTHORS[row["method"]]
        assert row["removed"] == pytest.approx(row["asked"], abs=0.005)
        assert row["perplexity"] > script.DENSE


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['method']}@{row['asked']:g}")
def test_a_measured_row_is_within_five_percent_of_the_authors_code_or_better(row: dict[str, Any], script: ModuleType):
    authors, _ = script.AUTHORS[row["method"]][row["asked"]]
    assert row["perplexity"] <= 1.05 * authors
    if row["perplexity"] < 0.95 * authors:
        assert row["method"] in script.BETTER, "say why it is better"


def test_what_is_not_measured_is_named(script: ModuleType):
    measured = {(row["method"], row["asked"]) for row in ROWS}
    published = {(method, asked) for method, rows in script.AUTHORS.items() for asked in rows}
    assert published - measured == set(script.NOT_MEASURED)
