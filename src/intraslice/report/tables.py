"""The tables of the report: every cell with its numbers, and accuracy task by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from intraslice.numbers import DASH, duration, number, perplexity, short_count, size, times
from intraslice.report.document import DENSE, OURS, SPEED, Cell, get
from intraslice.report.words import asked, key, percent

Path = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of numbers.

    Attributes:
        title: head of the column.
        unit: small text below the head.
        path: where the number is in a cell.
        text: how it is written.
        best: "min" or "max" if the best of each sparsity is marked.
        error: path of the standard error, if the number has one.
    """

    title: str
    unit: str
    path: Path
    text: Callable[[float | None], str]
    best: str = ""
    error: Path = ()


COLUMNS = (
    Column(title="Removed", unit="of layer weights", path="sparsity", text=lambda v: percent(v, 2)),
    Column(title="Perplexity", unit="lower is better", path="perplexity", text=perplexity, best="min"),
    Column(title="Accuracy", unit="average of tasks", path="average", text=percent, best="max"),
    Column(title="Decode", unit="tokens/s", path="speed.decode_tokens_per_second", text=number),
    Column(title="Decode", unit="\u00d7 dense", path=SPEED, text=times, best="max"),
    Column(title="Prefill", unit="tokens/s", path="speed.prefill_tokens_per_second", text=number),
    Column(title="Prefill", unit="\u00d7 dense", path="speed.prefill_speedup", text=times, best="max"),
    Column(title="Parameters", unit="all", path="parameters", text=short_count),
    Column(title="Parameters", unit="decoder layers", path="layer_parameters", text=short_count),
    Column(title="Weights", unit="on disk", path="weight_bytes", text=size),
    Column(title="KV cache", unit="per token", path="speed.kv_cache_bytes_per_token", text=size, best="min"),
    Column(title="Memory", unit="peak, running", path="speed.peak_memory_bytes", text=size, best="min"),
    Column(title="Pruning", unit="time", path="prune.seconds.total", text=duration, best="min"),
    Column(title="Pruning", unit="peak memory", path="prune.peak_memory_bytes", text=size, best="min"),
)


PAIRED = Column(
    title="Accuracy",
    unit="minus dense, paired",
    path="paired.average.difference",
    text=lambda v: percent(v, 2),
    error=("paired", "average", "stderr"),
)
"""Known where the answers to single questions are."""

DISTANCES = (
    Column(title="Log gap", unit="mean of the texts", path="mean_gap", text=lambda v: number(v, 3), best="min"),
    Column(title="KL", unit="nats a token, to dense", path="mean_kl", text=lambda v: number(v, 3), best="min"),
    Column(title="Same token", unit="as dense", path="mean_agreement", text=percent, best="max"),
)
"""How far a cell is from the dense model, over all texts."""

AFTER_HEALING = (
    Column(title="Healed", unit="perplexity", path="healed.perplexity", text=perplexity, best="min"),
    Column(title="Healed", unit="mean log gap", path="healed.mean_gap", text=lambda v: number(v, 3), best="min"),
)
"""What the same prune reaches after healing; it is a row of its own as well."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Radio buttons for a sparsity.

    Attributes:
        name: of the group.
        options: value and text of each button.
        chosen: value of the one that is pressed at first.
    """

    name: str
    options: Sequence[tuple[str, str]]
    chosen: str


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number in a table.

    Attributes:
        text: as it is shown.
        sort: by which the column is sorted; None where nothing was measured.
        best: whether it is marked as the best of its sparsity.
        spread: its standard error, or "".
    """

    text: str
    sort: float | None = None
    best: bool = False
    spread: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A cell in a table.

    Attributes:
        kinds: CSS classes.
        label: row name of the method.
        key: the sparsity by which the row is found.
        sort: the sparsity by which rows are sorted.
        asked: the sparsity as it is shown.
        error: sentence of a failed cell, or "".
        values: its numbers, column by column; none of a failed cell.
    """

    kinds: str
    label: str
    key: str
    sort: float
    asked: str
    error: str
    values: Sequence[Value]


@dataclass(frozen=True, kw_only=True)
class Table:
    """What `table.html` shows.

    Attributes:
        caption: for those who do not see the table.
        columns: of numbers.
        rows: the cells.
        filtered: whether there is a place for a choice of sparsities.
        choice: the choice, if there is more than one sparsity.
    """

    template = "table.html"
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    filtered: bool = False
    choice: Choice | None = None


def main_table(cells: Sequence[Cell], caption: str, choice: Choice | None) -> Table:
    """Return the table of all cells, with the sentence of those that failed."""
    columns = [column for column in COLUMNS if _measured(cells, column.path)]
    columns[2:2] = [column for column in (*DISTANCES, *AFTER_HEALING) if _measured(cells, column.path)]
    return Table(caption=caption, columns=columns, rows=_rows(cells, columns), filtered=True, choice=choice)


def text_table(cells: Sequence[Cell], caption: str) -> Table | None:
    """Return perplexity, log gap, KL divergence and agreement text by text; None if there is one text only."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.get("texts") or {}))
    columns: list[Column] = []
    for name in names:
        columns += [
            Column(title=name, unit="perplexity", path=("texts", name), text=perplexity, best="min"),
            Column(title=name, unit="log gap", path=("gaps", name), text=lambda v: number(v, 3), best="min"),
            Column(title=name, unit="KL", path=("divergence", name, "kl"), text=lambda v: number(v, 3), best="min"),
            Column(title=name, unit="same token", path=("divergence", name, "agreement"), text=percent, best="max"),
        ]
    columns = [column for column in (*columns, DISTANCES[0]) if _measured(cells, column.path)]
    return Table(caption=caption, columns=columns, rows=_rows(cells, columns)) if names else None


def task_table(cells: Sequence[Cell], caption: str) -> Table | None:
    """Return accuracy by task, with standard errors; None if no task was measured."""
    cells = [cell for cell in cells if cell.get("tasks")]
    names = list(dict.fromkeys(name for cell in cells for name in cell["tasks"]))
    columns = [column for name in names if (column := _task_column(cells, name))]
    if not columns:
        return None
    columns = [*columns, COLUMNS[2], *([PAIRED] if _measured(cells, PAIRED.path) else [])]
    return Table(caption=caption, columns=columns, rows=_rows(cells, columns))


def _task_column(cells: Sequence[Cell], name: str) -> Column | None:
    # Names one by one: the name of a task may have a dot.
    for field in ("acc_norm", "acc"):
        if _measured(cells, ("tasks", name, field)):
            path, error = ("tasks", name, field), ("tasks", name, f"{field}_stderr")
            return Column(title=name, unit=field, path=path, text=percent, best="max", error=error)
    return None


def _measured(cells: Sequence[Cell], path: Path) -> bool:
    return any(get(cell, path) is not None for cell in cells)


def _rows(cells: Sequence[Cell], columns: Sequence[Column]) -> list[Row]:
    best = {column.path: _best_of(cells, column) for column in columns if column.best}
    return [_row(cell, columns, best) for cell in sorted(cells, key=_order)]


def _order(cell: Cell) -> tuple[float, float]:
    value = get(cell, "perplexity")
    return (cell.get("asked") or 0.0, float("inf") if value is None else value)


def _best_of(cells: Sequence[Cell], column: Column) -> dict[Any, float]:
    groups: dict[Any, list[float]] = {}
    for cell in cells:
        value = get(cell, column.path)
        if value is not None and cell["method"] != DENSE and not cell.get("error"):
            groups.setdefault(cell["asked"], []).append(value)
    pick = min if column.best == "min" else max
    # Where all are alike, none is best.
    return {value: pick(values) for value, values in groups.items() if min(values) < max(values)}


def _row(cell: Cell, columns: Sequence[Column], best: dict[Path, dict[Any, float]]) -> Row:
    dense, wanted = cell["method"] == DENSE, cell.get("asked")
    kinds = [kind for kind, on in (("dense", dense), ("ours", cell["method"] == OURS)) if on]
    error = cell.get("error")
    return Row(
        kinds=" ".join(kinds),
        label=cell["label"],
        key=key(wanted or 0),
        sort=wanted or 0,
        asked=DASH if dense else asked(wanted),
        error=str(error) if error else "",
        values=[] if error else [_value(cell, c, best.get(c.path, {}).get(wanted)) for c in columns],
    )


def _value(cell: Cell, column: Column, best: float | None) -> Value:
    value = get(cell, column.path)
    if value is None:
        return Value(text=DASH)
    error = get(cell, column.error) if column.error else None
    return Value(
        text=column.text(value),
        sort=value,
        best=value == best and cell["method"] != DENSE,
        spread="" if error is None else f"\u00b1 {100 * error:.{2 if column is PAIRED else 1}f}",
    )
