"""From a pruned checkpoint to what other runtimes load; one file a target."""

from __future__ import annotations

import importlib
from pathlib import Path

from intraslice.errors import RecipeError, nearest
from intraslice.exporters.base import ExportOptions, ExportReport, open_pruned
from intraslice.progress import Progress, SilentProgress

EXPORTERS = ("stock", "padded", "gguf", "onnx")
"""Names of the exporters: `export_<name>` in the module of that name."""


def export_checkpoint(
    model: str, to: str, output: Path, options: ExportOptions | None = None, progress: Progress | None = None
) -> ExportReport:
    """Write a pruned checkpoint in the form of another runtime.

    Args:
        model: folder that `prune` has written.
        to: name of the exporter.
        output: folder or file to write; it appears under its name when it is whole and verified.
        options: settings.
        progress: shows the layers.

    Raises:
        IntraSliceError: the checkpoint is not ours, the target cannot express it, or the output cannot be written.
    """
    if to not in EXPORTERS:
        raise RecipeError(f"unknown export {to!r}; exports are {', '.join(EXPORTERS)}.{nearest(to, EXPORTERS)}")
    checkpoint = open_pruned(model)
    # Loaded by name: an exporter imports packages that need not be installed for the others.
    exporter = getattr(importlib.import_module(f"intraslice.exporters.{to}"), f"export_{to}")
    return exporter(checkpoint, output, options or ExportOptions(), progress or SilentProgress())
