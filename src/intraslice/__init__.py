"""Structured pruning of Hugging Face language models to smaller dense checkpoints that load everywhere.

After `import intraslice`, `AutoModelForCausalLM.from_pretrained` loads pruned checkpoints.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intraslice.api import analyze, benchmark, benchmark_layers, evaluate, evaluate_tasks, export, load, prune

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "analyze",
    "benchmark",
    "benchmark_layers",
    "evaluate",
    "evaluate_tasks",
    "export",
    "load",
    "prune",
]


class _RegisterAfterImport(MetaPathFinder):
    """Registers the pruned architectures when transformers has been imported.

    Registering takes the seconds that torch and transformers take to import; a program that never imports
    them, like `intraslice --help`, must not pay for it. The end of the import of transformers itself is the
    one moment when nothing of it is half imported and no model class can have been looked up.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the normal spec of transformers, with registration as the last step of its import."""
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            importlib.import_module("intraslice.runtime").register()

        setattr(spec.loader, "exec_module", execute_and_register)  # noqa: B010 - a method, on this instance only
        return spec


if "transformers" in sys.modules:
    importlib.import_module("intraslice.runtime").register()
else:
    sys.meta_path.insert(0, _RegisterAfterImport())


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("intraslice.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
