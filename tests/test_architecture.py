"""Rules of docs/design.md that `lint-imports` cannot see; those that it sees stand in pyproject.toml."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "intraslice"
FILES = sorted(SOURCE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def test_one_file_imports_lm_eval():
    users = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            users |= {module_of(path) for name in names if name.split(".")[0] == "lm_eval"}
    assert users == {"evaluation.harness"}


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
