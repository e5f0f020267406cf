"""docs/families.md says what the tests of the families said, of exactly the families of the table."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from intraslice.runtime.families_intraslice import FAMILIES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("families_script", ROOT / "scripts" / "families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(script: Any) -> dict[str, Any]:
    return json.loads(script.OUTCOMES.read_text(encoding="utf-8"))


def test_the_page_is_what_the_command_writes(script: Any, data: dict[str, Any]) -> None:
    """Fails when a row of the table changes, or when the page is edited by hand."""
    assert script.PAGE.read_text(encoding="utf-8") == script.page(data), "run: python scripts/families.py"


def test_every_family_was_tested_in_every_way_that_it_can_be(script: Any, data: dict[str, Any]) -> None:
    outcomes = data["outcomes"]
    assert outcomes.keys() == FAMILIES.keys(), "run: python scripts/families.py"
    for name, spec in FAMILIES.items():
        for check in script.CHECKS:
            refused = script.refusal(spec, check.title)
            # Not all families are traced for ONNX: it takes long.
            needed = refused is None and check.title != "ONNX"
            assert outcomes[name].get(check.title, "no test") in (("passed",) if needed else ("passed", "no test")), (
                name,
                check.title,
            )
            assert refused != "", f"{name} is refused without a reason"
            assert refused is None or check.title not in outcomes[name], f"{name} passes what the page says it cannot"


def test_the_tests_of_the_columns_exist(script: Any) -> None:
    for check in script.CHECKS:
        file, function = check.test.split("::")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8")


def test_a_failure_is_shown(script: Any, data: dict[str, Any], tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.runtime.test_families" '
        'name="test_sparsity_zero_is_the_identity[llama]"><failure message="no"/></testcase>'
        '<testcase classname="tests.runtime.test_families" name="test_sparsity_zero_is_the_identity[llama biased]"/>'
        '<testcase classname="tests.runtime.test_families" name="test_sparsity_zero_is_the_identity[opt]"/>'
        '<testcase classname="tests.runtime.test_families" name="test_of_something_else[opt]"/>'
        "</testsuite></testsuites>"
    )
    outcomes = script.read_outcomes(report)
    assert outcomes == {"llama": {"sparsity 0": "failed"}, "opt": {"sparsity 0": "passed"}}
    assert "**FAILED**" in script.page({**data, "outcomes": outcomes})
