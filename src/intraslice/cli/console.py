"""What the commands share: progress bars, tables, numbers for people."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, Any

import typer
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

from intraslice.border import printable
from intraslice.numbers import duration, percent
from intraslice.results.sites import short_site_title

if TYPE_CHECKING:
    from intraslice.runtime.families_intraslice import LayerShape

MAX_LINE = 100_000
"""Characters of a line of a result: a row of a table may be long."""
MAX_NOTE = 2000
"""Characters of a line of progress."""

LogJson = Annotated[
    bool, typer.Option("--log-json", help="Report progress as JSON, one object a line, on standard error.")
]


class Stopped(KeyboardInterrupt):
    """The process was asked to end by a signal, and ends as after Ctrl-C: what is finished is kept."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def interrupted(error: KeyboardInterrupt, advice: str, *, as_json: bool) -> int:
    """Say in one line that the work was stopped, by whom, and what to do next.

    Args:
        error: what stopped it.
        advice: what to do next.
        as_json: as an object of --log-json.

    Returns:
        The exit status: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    how = f"stopped by {error}" if isinstance(error, Stopped) else "interrupted"
    sentence = f"{how}; {advice}"
    if as_json:
        log_json("stopped", message=sentence)
    else:
        complain(sentence)
    return error.status if isinstance(error, Stopped) else 128 + signal.SIGINT


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn the first SIGTERM or SIGHUP into an exception, so that the work ends in order; a second one kills.

    Libraries in Rust make an error of their own of an exception that a signal raises while they work. So whatever comes
    out after a signal, Ctrl-C included, comes out of here as what the signal has raised.
    """
    received: list[KeyboardInterrupt] = []

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        received.append(Stopped(number))
        raise received[-1]

    def interrupt(*_: object) -> None:
        received.append(KeyboardInterrupt())
        raise received[-1]

    before = {}
    # Signals can be received by the main thread only; nohup has chosen that SIGHUP is ignored.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if received:
            raise received[0] from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


INTERVAL = 60.0
"""Seconds between two lines about a long step where standard error is no terminal."""


@dataclass
class _Step:
    """A step that is going on."""

    description: str
    total: int
    done: int = 0
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


class ConsoleProgress:
    """Progress on standard error: bars with rate and time left on a terminal.

    Elsewhere, in a file or a job of a cluster, a line a minute, and one for each finished step.

    Args:
        log_json: one JSON object a line in the place of all this, with the same times in seconds.
        interval: seconds between two lines about a step that goes on.
    """

    def __init__(self, log_json: bool = False, interval: float = INTERVAL) -> None:
        self._console = Console(stderr=True)
        self._log_json = log_json
        self._interval = interval
        self._steps: list[_Step] = []
        self._stop = threading.Event()
        self._bars = RichBars(
            SpinnerColumn(),
            # Words of a stranger may be in it, which are no markup.
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )

    def __enter__(self) -> ConsoleProgress:
        if self._console.is_terminal and not self._log_json:
            self._bars.start()
        else:
            threading.Thread(target=self._report, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        # Without a terminal it was not started, and would leave an empty line.
        if self._bars.live.is_started:
            self._bars.stop()

    @contextmanager
    def step(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a step of `total` units; the yielded function advances it."""
        step = _Step(description, total)
        task = self._bars.add_task("  " * len(self._steps) + description, total=total)
        self._steps.append(step)
        if self._log_json and len(self._steps) == 1:
            self._log("begin", step=description, total=total)

        def advance(units: int) -> None:
            step.done += units
            self._bars.advance(task, units)

        try:
            yield advance
        finally:
            self._steps.remove(step)
            self._bars.remove_task(task)
        # Inner steps come once per layer; only the outer ones stay on the screen.
        if self._steps:
            return
        if self._log_json:
            self._log("end", step=description, done=step.done, total=total, seconds=round(step.seconds, 3))
        else:
            self.note(f"{description}: {step.done} of {total} in {step.seconds:.1f} s")

    def note(self, message: str) -> None:
        """Print a line that stays."""
        if self._log_json:
            self._log("note", message=message)
        else:
            self._console.print(printable(message, MAX_NOTE), style="dim", markup=False, highlight=False)

    def _report(self) -> None:
        while not self._stop.wait(self._interval):
            # A copy: steps come and go while this is printed.
            if steps := list(self._steps):
                self._report_on(steps)

    def _report_on(self, steps: Sequence[_Step]) -> None:
        outer, inner = steps[0], steps[1:]
        # What is done of the steps within is a part of one unit of the outer one.
        part, share = 0.0, 1.0
        for step in steps:
            share /= max(step.total, 1)
            part += min(step.done, step.total) * share
        left = outer.seconds * (1 - part) / part if part else None
        each = outer.seconds / outer.done if outer.done else None
        if self._log_json:
            within = [{"step": step.description, "done": step.done, "total": step.total} for step in inner]
            times = {"seconds": outer.seconds, "seconds_each": each, "seconds_left": left}
            rounded = {name: None if value is None else round(value, 3) for name, value in times.items()}
            self._log("progress", step=outer.description, done=outer.done, total=outer.total, **rounded, within=within)
            return
        words = [f"{outer.description}: {outer.done} of {outer.total} in {duration(outer.seconds)}"]
        words += [f"{duration(each)} each"] if each is not None else []
        words += [f"about {duration(left)} left"] if left is not None else []
        words += [f"{step.description} {step.done} of {step.total}" for step in inner]
        self.note(", ".join(words))

    def _log(self, event: str, **fields: Any) -> None:
        log_json(event, **fields)


def log_json(event: str, **fields: Any) -> None:
    """Print a JSON object of one line on standard error: when, what, and the fields."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    print(json.dumps({"time": now, "event": event, **fields}), file=sys.stderr, flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose columns are aligned to the right, but for the first."""
    # As narrow as it gets: ten columns have to fit into 80 characters.
    table = Table(title=_words(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(_words(column), justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(_words, row))
    _output().print(table)


def _words(text: str) -> Text:
    """Return a text that is shown as it is, whatever brackets and signs of control are in it."""
    return Text(printable(text, MAX_NOTE))


def print_line(line: str) -> None:
    """Print a line on standard output."""
    _output().print(printable(line, MAX_LINE), markup=False, highlight=False, soft_wrap=True)


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
