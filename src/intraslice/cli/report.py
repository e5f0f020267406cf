"""`intraslice report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intraslice.cli.console import print_line
from intraslice.names import expanded


def report(
    results: Annotated[
        list[str],
        typer.Argument(metavar="RESULT...", help="Folders of comparisons or pruned checkpoints, or their .json files."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="The page to write.")],
    table: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Also write the table, as Markdown (or .csv, .json).")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Make the report from results that exist, without measuring anything."""
    from intraslice.comparison.merge import merge_results
    from intraslice.comparison.tables import TABLE_BEGINS, table_text
    from intraslice.files import check_replaced, write_text
    from intraslice.report import PAGE_BEGINS, render_report

    output = expanded(output)
    check_replaced(output, PAGE_BEGINS)
    if table is not None:
        table = expanded(table)
        check_replaced(table, *TABLE_BEGINS.get(table.suffix, ()))
    document = merge_results(results)
    page = render_report(document)
    rows = None if table is None else table_text(document, table.suffix)
    write_text(output, page)
    print_line(f"report        {output} ({len(document['cells'])} cells)")
    if table is not None and rows is not None:
        write_text(table, rows)
        print_line(f"table         {table}")
