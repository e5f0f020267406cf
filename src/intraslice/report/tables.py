"""The tables of the report: every cell with its numbers, and accuracy task by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from intraslice.report.figures import (
    DASH,
    DENSE,
    OURS,
    SPEED,
    Cell,
    asked,
    count,
    duration,
    get,
    key,
    number,
    percent,
    perplexity,
    size,
    times,
)

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
    Column(title="Parameters", unit="all", path="parameters", text=count),
    Column(title="Parameters", unit="decoder layers", path="layer_parameters", text=count),
    Column(title="Weights", unit="on disk", path="weight_bytes", text=size),
    Column(title="KV cache", unit="per token", path="speed.kv_cache_bytes_per_token", text=size, best="min"),
    Column(title="Memory", unit="peak, running", path="speed.peak_memory_bytes", text=size, best="min"),
    Column(title="Pruning", unit="time", path="prune.seconds.total", text=duration, best="min"),
    Column(title="Pruning", unit="peak memory", path="prune.peak_memory_bytes", text=size, best="min"),
)


def main_table(cells: Sequence[Cell], caption: str) -> str:
    """Return the table of all cells, with the sentence of those that failed."""
    return _table(cells, [c for c in COLUMNS if _measured(cells, c.path)], caption)


def task_table(cells: Sequence[Cell], caption: str) -> str:
    """Return accuracy by task, with standard errors; "" if no task was measured."""
    cells = [cell for cell in cells if cell.get("tasks")]
    names = list(dict.fromkeys(name for cell in cells for name in cell["tasks"]))
    columns = [column for name in names if (column := _task_column(cells, name))]
    if not columns:
        return ""
    return _table(cells, [*columns, COLUMNS[2]], caption)


def _task_column(cells: Sequence[Cell], name: str) -> Column | None:
    # Names one by one: the name of a task may have a dot.
    for field in ("acc_norm", "acc"):
        if _measured(cells, ("tasks", name, field)):
            path, error = ("tasks", name, field), ("tasks", name, f"{field}_stderr")
            return Column(title=name, unit=field, path=path, text=percent, best="max", error=error)
    return None


def _measured(cells: Sequence[Cell], path: Path) -> bool:
    return any(get(cell, path) is not None for cell in cells)


def _table(cells: Sequence[Cell], columns: Sequence[Column], caption: str) -> str:
    best = {column.path: _best_of(cells, column) for column in columns if column.best}
    heads = "".join(_head(c.title, c.unit) for c in columns)
    rows = "".join(_row(cell, columns, best) for cell in sorted(cells, key=_order))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="sortable"><caption class="sr">{escape(caption)}</caption><thead><tr>'
        f"{_head('Method', '', 'method')}{_head('Asked', 'sparsity')}{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


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


def _head(title: str, unit: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    small = f"<small>{escape(unit)}</small>" if unit else ""
    return f'<th scope="col"{name}><button type="button">{escape(title)}{small}</button></th>'


def _row(cell: Cell, columns: Sequence[Column], best: dict[Path, dict[Any, float]]) -> str:
    kinds = [kind for kind, on in (("dense", cell["method"] == DENSE), ("ours", cell["method"] == OURS)) if on]
    label = escape(cell["label"])
    head = (
        f'<tr class="{" ".join(kinds)}" data-asked="{key(cell.get("asked") or 0)}"><th scope="row" class="method">'
        f'<span data-swatch="{label}">{label}</span></th>'
        f'<td data-sort="{cell.get("asked") or 0}">{DASH if "dense" in kinds else asked(cell.get("asked"))}</td>'
    )
    if cell.get("error"):
        return f'{head}<td class="failed" colspan="{len(columns)}">Failed: {escape(str(cell["error"]))}</td></tr>'
    return head + "".join(_value(cell, c, best.get(c.path, {}).get(cell.get("asked"))) for c in columns) + "</tr>"


def _value(cell: Cell, column: Column, best: float | None) -> str:
    value = get(cell, column.path)
    if value is None:
        return f"<td>{DASH}</td>"
    error = get(cell, column.error) if column.error else None
    spread = "" if error is None else f" <small>\u00b1 {100 * error:.1f}</small>"
    if value == best and cell["method"] != DENSE:
        return f'<td class="best" data-sort="{value}">{column.text(value)}<span class="sr"> (best)</span>{spread}</td>'
    return f'<td data-sort="{value}">{column.text(value)}{spread}</td>'
