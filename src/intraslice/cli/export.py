"""`intraslice export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intraslice.cli.console import ConsoleProgress, LogJson, print_line, write_json
from intraslice.exporters.registry import EXPORTERS, readers

if TYPE_CHECKING:
    from intraslice.exporters.options import ExportReport

_FORMS = "; ".join(f"{name}: {exporter.summary}" for name, exporter in EXPORTERS.items())


def export(
    checkpoint: Annotated[str, typer.Argument(help="Folder that 'intraslice prune' has written.")],
    to: Annotated[str, typer.Option(metavar="|".join(EXPORTERS), help=f"What to write. {_FORMS}.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; for gguf, the file.")],
    dtype: Annotated[
        str, typer.Option(help="Of the written weights: auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    pad_to: Annotated[
        str | None,
        typer.Option(
            metavar="dense|max",
            help=f"For {readers('pad_to')}: the dense shapes (default), or the largest that occur.",
        ),
    ] = None,
    tokenizer_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help=f"For {readers('tokenizer_from')}: a GGUF file of the base model with its tokenizer."
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Reload the result in its runtime, if installed; compare logits."),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    log_json: LogJson = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write a pruned checkpoint for stock transformers classes, llama.cpp or ONNX."""
    from intraslice import api

    settings: dict[str, Any] = {
        "dtype": dtype,
        "pad_to": pad_to,
        "tokenizer_from": tokenizer_from,
        "verify": verify,
        "overwrite": overwrite,
    }
    with ConsoleProgress(log_json) as progress:
        report = api.export(checkpoint, to=to, output=output, progress=progress, **settings)
    if as_json:
        write_json(asdict(report))
    else:
        _print(report)


def _print(report: ExportReport) -> None:
    for note in report.notes:
        print_line(f"note          {note}")
    if report.max_logit_difference is not None:
        print_line(f"verified      largest logit difference to the checkpoint {report.max_logit_difference:.2g}")
    print_line(f"seconds       {report.seconds:.1f}")
    print_line(f"{report.to:14}{report.output}")
