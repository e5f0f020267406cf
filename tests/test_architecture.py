"""The rules of docs/design.md that imports can show."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "intraslice"
FILES = sorted(SOURCE.rglob("*.py"))

# Prefix of the files -> prefixes of intraslice modules that they may import.
SHAPES = "runtime.families_intraslice"
PURE = {"errors", "options", "stats", "linalg", "selection", "edits", SHAPES}
RULES: dict[str, set[str]] = {
    "runtime": {"runtime"},
    "errors": set(),
    "options": set(),
    "progress": set(),
    "stats": PURE,
    "linalg": PURE,
    "selection": PURE,
    "edits": PURE,
    "compressors": PURE | {"compressors"},
    "allocators": PURE | {"allocators"},
    "placement": {"errors"},
    "evaluation.likelihood": {"evaluation.perplexity"},
    "evaluation.task_data": {"errors"},
    "blocks": {"edits", "runtime"},
    "surgery": {"blocks", "edits", "runtime"},
    "checkpoint": {"checkpoint", "errors", "names", "progress", "runtime"},
    "exporters": {"exporters", "edits", "checkpoint", "errors", "progress"}
    | {"placement", "loading", "runtime", "result"},
    "report": {"report", "errors", "numbers", "results.sites"},
    "presets": set(),
    "comparison": {"comparison", "api", "pruning", "recipes", "errors", "progress", "results", "report", "evaluation"}
    | {"checkpoint", "data", "inspection", "loading", "methods.presets", "names", "placement", "process", "speed"}
    | {"streaming.analysis", ""},
    "process": {"errors", "progress"},
    "names": set(),
    "numbers": set(),
    "results.sites": set(),
    "engine": PURE
    | {"engine", "compressors", "allocators", "blocks", "surgery", "checkpoint", "calibration"}
    | {"placement", "progress", "result", "model_card", "runtime", ""},
    # Judges saved models only.
    "evaluation": {"evaluation", "errors", "progress", "runtime"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "intraslice":
            found.add(node.module.removeprefix("intraslice").removeprefix("."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("intraslice.") for a in node.names if a.name.startswith("intraslice")}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_one_way(path):
    module = module_of(path)
    for prefix, allowed in RULES.items():
        if module == prefix or module.startswith(prefix + "."):
            for target in imported(path):
                assert any(target == a or (a and target.startswith(a + ".")) for a in allowed), (
                    f"{module} must not import intraslice.{target}"
                )


def test_one_file_imports_lm_eval():
    users = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            users |= {module_of(path) for name in names if name.split(".")[0] == "lm_eval"}
    assert users == {"evaluation.harness"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_the_command_line_imports_the_command_line(path):
    if not module_of(path).startswith(("cli", "__main__")):
        assert not any(target.startswith("cli") for target in imported(path))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_the_command_line_imports_comparisons(path):
    if not module_of(path).startswith(("cli", "comparison")):
        assert not any(target.startswith("comparison") for target in imported(path))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_devices_are_decided_in_one_place(path):
    if path.name == "placement.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith("cuda"), f"{module_of(path)} names a device"
        if isinstance(node, ast.Attribute):
            assert node.attr != "cuda", f"{module_of(path)} uses .cuda"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_is_printed_outside_of_the_command_line(path):
    if module_of(path).startswith("cli"):
        return
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls)


def test_files_that_travel_import_only_torch_and_transformers():
    for path in (SOURCE / "runtime").glob("*_intraslice.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                root = node.module.split(".")[0]
                assert root in sys.stdlib_module_names | {"torch", "transformers", "huggingface_hub"}, node.module
