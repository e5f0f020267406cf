"""Structured pruning of Hugging Face language models to smaller dense checkpoints that load everywhere.

After `import intraslice`, `AutoModelForCausalLM.from_pretrained` loads pruned checkpoints.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from intraslice.api import (
        analyze,
        benchmark,
        benchmark_layers,
        compare_tasks,
        evaluate,
        evaluate_tasks,
        evaluate_texts,
        export,
        heal,
        load,
        prune,
    )

__version__ = version("intraslice")
__all__ = [
    "__version__",
    "analyze",
    "benchmark",
    "benchmark_layers",
    "compare_tasks",
    "evaluate",
    "evaluate_tasks",
    "evaluate_texts",
    "export",
    "heal",
    "load",
    "prune",
]


_RUNTIME = ("intraslice.runtime.configuration_intraslice", "intraslice.runtime.modeling_intraslice")


def _half_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _register(imported: Any) -> None:
    """Register the pruned architectures with transformers, once all that it needs is there."""
    # Our own runtime may be what imports transformers; then its end, which comes later, is the moment.
    if not any(name != imported.__name__ and _half_imported(name) for name in _RUNTIME):
        importlib.import_module("intraslice.runtime").register()


# Registering takes the seconds that torch and transformers take to import; a program that never imports them, like
# `intraslice --help`, must not pay for it. The end of the import of transformers itself is the one moment when nothing
# of it is half imported and no model class can have been looked up; when it is imported already, that is now.
for _name in ("transformers", *_RUNTIME):
    wrapt.register_post_import_hook(_register, _name)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("intraslice.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
