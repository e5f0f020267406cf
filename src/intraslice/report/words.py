"""The headline of the report: what the numbers say, also where they do not favour us."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from intraslice.report.figures import DENSE, OURS, SPEED, Cell, asked, get, number, percent, perplexity, times

# Cells further than this from what was asked are not the same size as their neighbours.
OFF_TARGET = 0.005


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number by which cells are ranked.

    Attributes:
        path: where it is in a cell.
        name: in a sentence.
        short: in a card.
        lower: whether lower is better.
        text: how it is written.
        tie: relative difference below which two cells are called equal: what another seed or run would move.
    """

    path: str
    name: str
    short: str
    lower: bool
    text: Callable[[float | None], str]
    tie: float = 0.005


PERPLEXITY = Metric(path="perplexity", name="perplexity", short="Perplexity", lower=True, text=perplexity)
AVERAGE = Metric(path="average", name="average accuracy", short="Accuracy", lower=False, text=percent)
DECODE = Metric(
    path=SPEED,
    name="decode speed",
    short="Decode",
    lower=False,
    text=lambda value: f"{times(value)} dense",
    tie=0.05,  # what two runs of the same two models differ by
)
METRICS = (PERPLEXITY, AVERAGE, DECODE)


def ranked(cells: Sequence[Cell], metric: Metric) -> list[Cell]:
    """Return the cells that have this number, best first."""
    found = [(value, index) for index, cell in enumerate(cells) if (value := get(cell, metric.path)) is not None]
    return [cells[index] for _, index in sorted(found, key=lambda pair: pair[0] if metric.lower else -pair[0])]


def tied(first: Cell, second: Cell, metric: Metric) -> bool:
    """Return whether two cells are too near to call one of them better."""
    a, b = get(first, metric.path), get(second, metric.path)
    if a is None or b is None:
        return False
    if metric is AVERAGE:
        return abs(a - b) <= math.hypot(standard_error(first), standard_error(second))
    return abs(a - b) <= metric.tie * max(abs(a), abs(b))


def standard_error(cell: Cell) -> float:
    """Return the standard error of the average accuracy, the tasks taken as independent."""
    tasks = cell.get("tasks") or {}
    errors = [
        get(task, "acc_norm_stderr" if get(task, "acc_norm") is not None else "acc_stderr") or 0.0
        for task in tasks.values()
    ]
    return math.hypot(*errors) / len(errors) if errors else 0.0


def by_sparsity(cells: Sequence[Cell]) -> dict[float, list[Cell]]:
    """Return the pruned cells that have a result, by the sparsity that was asked for."""
    groups: dict[float, list[Cell]] = {}
    for cell in cells:
        if cell["method"] != DENSE and not cell.get("error"):
            groups.setdefault(cell["asked"], []).append(cell)
    return dict(sorted(groups.items()))


def headline(cells: Sequence[Cell]) -> str:
    """Return the summary of one model as HTML: sentences, then a card for each sparsity."""
    groups = by_sparsity(cells)
    if not groups:
        return "<p>No pruned model has a result yet.</p>"
    sentences = [_dense(cells)]
    sentences += [_best(groups, metric) for metric in METRICS]
    sentences += [_off_target(groups), _failed(cells)]
    cards = "".join(_card(value, group) for value, group in groups.items())
    paragraphs = "".join(f"<p>{sentence}</p>" for sentence in sentences if sentence)
    return f'<div class="lead">{paragraphs}</div><ul class="cards">{cards}</ul>'


def _dense(cells: Sequence[Cell]) -> str:
    dense = next((cell for cell in cells if cell["method"] == DENSE), None)
    if dense is None:
        return ""
    values = [f"{m.name} {m.text(get(dense, m.path))}" for m in METRICS[:2] if get(dense, m.path) is not None]
    tokens = get(dense, "speed.decode_tokens_per_second")
    values += [f"{DECODE.name} {number(tokens)} tokens/s"] if tokens is not None else []
    return f"The dense model: {', '.join(values)}." if values else ""


def _best(groups: dict[float, list[Cell]], metric: Metric) -> str:
    """Who is best where, in one or more sentences; ours is named at every sparsity where it is not first."""
    wins: dict[str, list[str]] = {}
    behind = []
    for value, group in groups.items():
        order = ranked(group, metric)
        if len(order) < 2:
            continue
        first = order[0]
        rivals = [cell["label"] for cell in order[1:] if tied(first, cell, metric)]
        tie = f" (tied with {escape(_join(rivals))})" if rivals else ""
        wins.setdefault(first["label"], []).append(asked(value) + tie)
        place = next((i for i, cell in enumerate(order) if cell["method"] == OURS), None)
        if place:
            own = metric.text(get(order[place], metric.path))
            behind.append(f"{own} at {asked(value)} (place {place + 1} of {len(order)})")
    if not wins:
        return ""
    best = "; ".join(f"<b>{escape(label)}</b> at {_join(where)}" for label, where in wins.items())
    rest = f" {OURS} has {_join(behind)}." if behind else ""
    return f"Best {metric.name}: {best}.{rest}"


def _off_target(groups: dict[float, list[Cell]]) -> str:
    off = [
        f"{escape(cell['label'])} ({percent(sparsity)} instead of {asked(value)})"
        for value, group in groups.items()
        for cell in group
        if (sparsity := get(cell, "sparsity")) is not None and abs(sparsity - value) > OFF_TARGET
    ]
    return f"Not of the size that was asked for, so compare with care: {_join(off)}." if off else ""


def _failed(cells: Sequence[Cell]) -> str:
    failed = [f"{escape(cell['label'])} at {asked(cell['asked'])}" for cell in cells if cell.get("error")]
    return f"Without a result (the table says why): {_join(failed)}." if failed else ""


def _card(value: float, group: list[Cell]) -> str:
    lines = "".join(_line(ranked(group, metric), metric) for metric in METRICS)
    return f"<li><h3>{asked(value)} <span>removed</span></h3><dl>{lines}</dl></li>"


def _line(order: list[Cell], metric: Metric) -> str:
    if not order:
        return ""
    first = order[0]
    ours = next((cell for cell in order if cell["method"] == OURS), None)
    rivals = [cell for cell in order[1:] if tied(first, cell, metric)]
    named = rivals or order[1:2]
    note = "the only one"
    if rivals:
        note = f"tied with {escape(_join([cell['label'] for cell in rivals]))}"
    elif named:
        note = f"next: {escape(named[0]['label'])} {metric.text(get(named[0], metric.path))}"
    if ours is not None and ours is not first and ours not in named:
        note += f"; {OURS} {metric.text(get(ours, metric.path))}"
    tokens = get(first, "speed.decode_tokens_per_second") if metric is DECODE else None
    if tokens is not None:
        note = f"{number(tokens)} tokens/s; {note}"
    return (
        f'<div><dt>{metric.short}</dt><dd><b class="num">{metric.text(get(first, metric.path))}</b> '
        f'<span class="who" data-swatch="{escape(first["label"])}">{escape(first["label"])}</span>'
        f"<small>{note}</small></dd></div>"
    )


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
