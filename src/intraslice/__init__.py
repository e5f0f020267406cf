"""Structured pruning of Hugging Face language models to smaller dense checkpoints that load everywhere.

After `import intraslice`, `AutoModelForCausalLM.from_pretrained` loads pruned checkpoints.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from intraslice.api import analyze, benchmark, benchmark_layers, evaluate, evaluate_tasks, export, heal, load, prune

__version__ = version("intraslice")
__all__ = [
    "__version__",
    "analyze",
    "benchmark",
    "benchmark_layers",
    "evaluate",
    "evaluate_tasks",
    "export",
    "heal",
    "load",
    "prune",
]


def _register(transformers: Any) -> None:
    """Register the pruned architectures with transformers."""
    importlib.import_module("intraslice.runtime").register()


# Registering takes the seconds that torch and transformers take to import; a program that never imports them, like
# `intraslice --help`, must not pay for it. The end of the import of transformers itself is the one moment when nothing
# of it is half imported and no model class can have been looked up; when it is imported already, that is now.
wrapt.register_post_import_hook(_register, "transformers")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("intraslice.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
