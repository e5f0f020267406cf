"""Files of tensors only do not wait for transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "intraslice.layers.weights",
        "intraslice.algebra.selection",
        "intraslice.algebra.statistics",
        "intraslice.algebra.linalg",
        "intraslice.methods.blockwise.heads",
        "intraslice.methods.slicegpt.algebra",
        "intraslice.methods.svd_llm.algebra",
    ],
)
def test_algebra_imports_no_transformers(module):
    code = f"import sys, {module}; assert 'torch' in sys.modules; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_family_table_imports_the_standard_library_only():
    code = (
        "import sys, intraslice.runtime.families_intraslice as f; assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
