"""Which exporter is meant, and calling it."""

from __future__ import annotations

import importlib
from pathlib import Path

from intraslice.checkpoint.pruned import open_pruned
from intraslice.checkpoint.writer import check_apart
from intraslice.exporters.options import ExportOptions, ExportReport
from intraslice.exporters.registry import check_options, find_exporter
from intraslice.progress import Progress, SilentProgress


def export_checkpoint(
    model: str, to: str, output: Path, options: ExportOptions | None = None, progress: Progress | None = None
) -> ExportReport:
    """Write a pruned checkpoint in the form of another runtime.

    Args:
        model: folder that `prune` has written.
        to: name of the exporter: a row of `registry.EXPORTERS`.
        output: folder or file to write; it appears under its name when it is whole and verified.
        options: settings; those that the exporter does not read keep their defaults.
        progress: shows the layers.

    Raises:
        IntraSliceError: the checkpoint is not ours, the target cannot express it, or the output cannot be written.
    """
    exporter, options = find_exporter(to), options or ExportOptions()
    check_options(to, options)
    check_apart(
        output, {"checkpoint": model, **({"tokenizer": options.tokenizer_from} if options.tokenizer_from else {})}
    )
    checkpoint = open_pruned(model)
    # Loaded by name: an exporter imports packages that need not be installed for the others.
    module, _, function = exporter.function.partition(":")
    return getattr(importlib.import_module(module), function)(checkpoint, output, options, progress or SilentProgress())
