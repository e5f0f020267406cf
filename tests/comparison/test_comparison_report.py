"""`intraslice report` over results that exist."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intraslice import api
from intraslice.cli.app import main
from intraslice.comparison.merge import merge_results
from support.small_comparison import document_of


@pytest.fixture
def report(tmp_path: Path, capfd):
    """Return a function (*results) -> (status, standard error, rows of the table)."""

    def call(*results: Path) -> tuple[int, str, list[dict[str, Any]]]:
        page, table = tmp_path / "page.html", tmp_path / "rows.json"
        for file in (page, table):
            file.unlink(missing_ok=True)
        capfd.readouterr()
        status = main(["report", *map(str, results), "-o", str(page), "--table", str(table)])
        assert page.exists() == table.exists() == (status == 0)
        return status, capfd.readouterr().err, json.loads(table.read_text()) if status == 0 else []

    return call


def changed(finished: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write a changed copy of a comparison's document."""
    document = document_of(finished)
    change(document)
    file = finished.parent / f"{name}.json"
    file.write_text(json.dumps(document))
    return file


def test_same_cells_are_taken_once(finished: Path, report):
    status, _, rows = report(finished, finished / "comparison.json")
    assert status == 0 and rows == json.loads((finished / "table.json").read_text())


def test_cells_of_two_comparisons(finished: Path, report):
    def other(document: dict[str, Any]) -> None:
        document["cells"] = document["cells"][-1:]
        document["cells"][0].update(key="another", label="whole heads", options={"ffn.damping": 0.5}, perplexity=7.0)

    status, _, rows = report(finished, changed(finished, "other", other))
    assert status == 0 and len(rows) == 6
    # One label for two sets of options would draw them as one line.
    assert [row["perplexity"] for row in rows if row["method"] == "whole heads (2)"] == [7.0]


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("calibration", "num_samples", 8),
        ("calibration", "tokens", {"*": "f" * 64}),
        ("text", "fingerprint", "f" * 24),
        ("text", "windows", 3),
        ("tasks", "data", "f" * 64),
        ("tasks", "limit", 5),
        ("speed", "prompt_tokens", 16),
        ("speed", "threads", 2),
    ],
)
def test_different_protocols_are_refused(finished: Path, report, section: str, field: str, value: Any):
    def with_all(document: dict[str, Any]) -> None:
        protocol = document["protocol"]
        protocol["tasks"] = {"names": ["piqa"], "limit": 4, "data": "a" * 64, "lm_eval": "0"}
        protocol["speed"] = {"prompt_tokens": 8, "threads": 1}

    def different(document: dict[str, Any]) -> None:
        with_all(document)
        here = document["protocol"][section]
        here[field] = dict.fromkeys(here[field], value["*"]) if isinstance(value, dict) else value

    first, second = changed(finished, "first", with_all), changed(finished, "second", different)
    status, error, _ = report(first, second)
    assert status == 2 and f"{section}.{field}" in error
    before = json.loads(first.read_text())["protocol"][section]
    for side in (before[field], value):
        shown = next(iter(side.values()))[:12] if isinstance(side, dict) else side
        assert repr(shown) in error


def test_speeds_of_another_machine_matter_only_where_both_have_speeds(finished: Path, report):
    def elsewhere(document: dict[str, Any]) -> None:
        document["protocol"]["machine"] = "another one"

    assert report(finished, changed(finished, "elsewhere", elsewhere))[0] == 0


def test_pruned_checkpoints(finished: Path, report, tiny_folder: Callable[..., Path], tmp_path: Path):
    out = tmp_path / "pruned"
    options = {"ffn.ffn_multiple": 1, "ffn.damping": 0.2}
    options |= {"calibration.source": "builtin", "calibration.num_samples": 4, "calibration.seqlen": 32}
    result = api.prune(str(tiny_folder("llama")), output=out, sparsity=0.3, method="naive", options=options)
    status, _, rows = report(finished, out)
    assert status == 0 and len(rows) == 6
    (row,) = [row for row in rows if row["asked"] == 0.3]
    assert row["parameters"] == result.pruned_parameters and row["perplexity"] is None
    (cell,) = [cell for cell in merge_results([str(out / "result.json")])["cells"]]
    assert cell["options"] == {"ffn.ffn_multiple": 1, "ffn.damping": 0.2}
    # The same model calibrated on other tokens.
    options["calibration.seed"] = 1
    other = api.prune(str(tiny_folder("llama")), output=tmp_path / "other", sparsity=0.3, options=options)
    status, error, _ = report(finished, Path(other.output))
    assert status == 2 and "calibration.seed is 0 in the first and 1 in the second" in error


def test_what_is_no_result_is_refused(finished: Path, report, tmp_path: Path):
    (tmp_path / "odd.json").write_text("[1]")
    (tmp_path / "torn.json").write_text("{")
    for name, expected in (("none", "no result"), ("odd.json", "is not a JSON object"), ("torn.json", "is not JSON")):
        status, error, _ = report(finished, tmp_path / name)
        assert status == 2 and expected in error
    page = tmp_path / "page.html"
    assert main(["report", str(finished), "-o", str(page), "--table", str(tmp_path / "table.txt")]) == 2
    assert not page.exists()
