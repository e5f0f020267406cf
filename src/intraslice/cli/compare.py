"""`intraslice compare`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intraslice.cli.console import ConsoleProgress, LogJson, complain, interrupted, print_line, print_table, write_json
from intraslice.names import expanded

if TYPE_CHECKING:
    from intraslice.comparison.run import Planned

FAILED_STATUS = 1


def compare(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="Models, methods, sparsities, and how to measure.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for results; finished cells in it are kept.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison (or the plan) as JSON.")] = False,
    log_json: LogJson = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Prune models by several methods at several sparsities, measure all in one way, and write tables and a report.

    What is finished is kept: repeat the command to go on after an interruption, or to add cells to the file.
    """
    from intraslice.comparison.spec import load_spec

    spec = load_spec(file)
    from intraslice.comparison.run import Comparison

    folder = expanded(output)
    with ConsoleProgress(log_json) as progress:
        comparison = Comparison(spec, folder, progress)
        if dry_run:
            _print_plan(comparison.plan(), as_json)
            return
        try:
            document = comparison.run(shlex.join(["intraslice", *context.obj]))
        except KeyboardInterrupt as error:
            advice = f"what is finished is in {folder}: repeat the command to go on."
            raise typer.Exit(interrupted(error, advice, as_json=log_json)) from None
    if as_json:
        write_json(document)
    else:
        _print_table(document, folder)
    failed = [cell for cell in document["cells"] if cell.get("error")]
    if failed:
        complain(f"{len(failed)} of {len(document['cells'])} cells failed; {folder / 'table.md'} says why.")
        raise typer.Exit(FAILED_STATUS)


def _print_plan(plan: Sequence[Planned], as_json: bool) -> None:
    if as_json:
        cells = [
            {
                "key": planned.work.key,
                "model": planned.work.cell.name,
                "label": planned.work.cell.shown_label,
                "asked": planned.work.cell.asked,
                "sweep": planned.work.cell.sweep,
                "run": list(planned.to_run),
                "prunes_again": planned.prunes_again,
            }
            for planned in plan
        ]
        write_json({"cells": cells})
        return
    rows = [[planned.work.cell.title, ", ".join(planned.to_run) or "finished"] for planned in plan]
    print_table("Cells", ("", "to run"), rows)
    again = [planned for planned in plan if planned.prunes_again]
    if again:
        print_line(
            f"{len(again)} cells are pruned again, because their checkpoints were deleted after the last measurement; "
            "`keep_checkpoints: true` would keep them."
        )
    print_line(f"{sum(bool(planned.to_run) for planned in plan)} of {len(plan)} cells to run")
    print_line("dry run: nothing was written.")


def _print_table(document: dict[str, Any], folder: Path) -> None:
    from intraslice.comparison.tables import markdown_table

    for line in markdown_table(document).splitlines():
        print_line(line)
    print_line(f"report        {folder / 'report.html'}")
