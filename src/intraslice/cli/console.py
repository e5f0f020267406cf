"""What the commands share: progress bars, tables, numbers for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars
from rich.table import Table
from rich.text import Text

from intraslice.numbers import percent
from intraslice.results.sites import short_site_title

if TYPE_CHECKING:
    from intraslice.runtime.families_intraslice import LayerShape

INTERRUPTED_STATUS = 130


def complain(line: str) -> None:
    """Print a line on standard error."""
    print(line, file=sys.stderr)


def write_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output."""
    print(json.dumps(content, indent=2))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


class ConsoleProgress:
    """Progress on standard error: bars with rate and time left on a terminal, else one line per step."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._depth = 0
        self._bars = RichBars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )

    def __enter__(self) -> ConsoleProgress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextmanager
    def step(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a step of `total` units; the yielded function advances it."""
        start = time.perf_counter()
        done = 0
        task = self._bars.add_task("  " * self._depth + description, total=total)
        self._depth += 1

        def advance(units: int) -> None:
            nonlocal done
            done += units
            self._bars.advance(task, units)

        try:
            yield advance
        finally:
            self._depth -= 1
            self._bars.remove_task(task)
        # Inner steps come once per layer; only the outer ones stay on the screen.
        if self._depth == 0:
            self.note(f"{description}: {done} of {total} in {time.perf_counter() - start:.1f} s")

    def note(self, message: str) -> None:
        """Print a line that stays."""
        self._console.print(message, style="dim", markup=False, highlight=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose columns are aligned to the right, but for the first."""
    # As narrow as it gets: ten columns have to fit into 80 characters.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _output().print(table)


def print_line(line: str) -> None:
    """Print a line on standard output."""
    _output().print(line, markup=False, highlight=False, soft_wrap=True)


def _output() -> Console:
    # Without a terminal rich assumes 80 columns and would cut the tables; files may be wider.
    console = Console()
    return console if console.is_terminal else Console(width=120)


_LAYER_COLUMNS = ("layer", "heads", "kv", "qk dim", "v dim", "FFN", "parameters", "kept")


def layer_columns(sites: Sequence[str]) -> list[str]:
    """Return the heads of a table of layers, with one column for the error at each site."""
    return [*_LAYER_COLUMNS, *(f"{short_site_title(site)} err" for site in sites)]


def layer_row(
    layer: int, shape: LayerShape, num_parameters: int, kept: float, errors: Mapping[str, float], sites: Sequence[str]
) -> list[str]:
    """Return the cells of a layer under `layer_columns(sites)`."""
    return [
        str(layer),
        str(shape.num_attention_heads),
        str(shape.num_key_value_heads),
        str(shape.qk_head_dim),
        str(shape.v_head_dim),
        str(shape.intermediate_size),
        f"{num_parameters:,}",
        percent(kept),
        *(f"{errors[site]:.4f}" if site in errors else "" for site in sites),
    ]
