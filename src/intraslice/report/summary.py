"""The headline of the report: what the numbers say, also where they do not favour us."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from intraslice.numbers import number, perplexity, times
from intraslice.report.document import DENSE, OURS, SPEED, Cell, by_sparsity, get
from intraslice.report.words import asked, percent

# Cells further than this from what was asked are not of the same size as their neighbors.
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


@dataclass(frozen=True, kw_only=True)
class Best:
    """Who is best in one metric.

    Attributes:
        metric: its name in a sentence.
        wins: the winners, each with the sparsities at which it wins, and with whom it is tied there.
        behind: what ours has at every sparsity where it is not first; "" if there is none.
    """

    metric: str
    wins: Sequence[tuple[str, str]]
    behind: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """The best cell of a card in one metric: the metric, its number, its row name, and how far the next one is."""

    metric: str
    value: str
    label: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """The best cells of one sparsity."""

    sparsity: str
    lines: Sequence[Line]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the numbers of a model say.

    Attributes:
        dense: sentence about the dense model, or "".
        best: who is best, metric by metric.
        warnings: sentences about cells to be compared with care, and about those without a result.
        cards: one for each sparsity; none without a result.
    """

    template = "summary.html"
    dense: str
    best: Sequence[Best]
    warnings: Sequence[str]
    cards: Sequence[Card]


def summarize(cells: Sequence[Cell]) -> Summary:
    """Return the summary of one model."""
    groups = by_sparsity(cells)
    best = [_best(groups, metric) for metric in METRICS]
    return Summary(
        dense=_dense(cells),
        best=[found for found in best if found is not None],
        warnings=[sentence for sentence in (_off_target(groups), _failed(cells)) if sentence],
        cards=[_card(value, group) for value, group in groups.items()],
    )


def _dense(cells: Sequence[Cell]) -> str:
    dense = next((cell for cell in cells if cell["method"] == DENSE), None)
    if dense is None:
        return ""
    values = [f"{m.name} {m.text(get(dense, m.path))}" for m in METRICS[:2] if get(dense, m.path) is not None]
    tokens = get(dense, "speed.decode_tokens_per_second")
    values += [f"{DECODE.name} {number(tokens)} tokens/s"] if tokens is not None else []
    return f"The dense model: {', '.join(values)}." if values else ""


def _best(groups: dict[float, list[Cell]], metric: Metric) -> Best | None:
    """Return who is best where, or None if no two cells have this number."""
    wins: dict[str, list[str]] = {}
    behind = []
    for value, group in groups.items():
        order = ranked(group, metric)
        if len(order) < 2:
            continue
        first = order[0]
        rivals = [cell["label"] for cell in order[1:] if tied(first, cell, metric)]
        tie = f" (tied with {_join(rivals)})" if rivals else ""
        wins.setdefault(first["label"], []).append(asked(value) + tie)
        place = next((i for i, cell in enumerate(order) if cell["method"] == OURS), None)
        if place:
            own = metric.text(get(order[place], metric.path))
            behind.append(f"{own} at {asked(value)} (place {place + 1} of {len(order)})")
    if not wins:
        return None
    return Best(
        metric=metric.name,
        wins=[(label, _join(where)) for label, where in wins.items()],
        behind=_join(behind) if behind else "",
    )


def _off_target(groups: dict[float, list[Cell]]) -> str:
    off = [
        f"{cell['label']} ({percent(sparsity)} instead of {asked(value)})"
        for value, group in groups.items()
        for cell in group
        if (sparsity := get(cell, "sparsity")) is not None and abs(sparsity - value) > OFF_TARGET
    ]
    return f"Not of the size that was asked for, so compare with care: {_join(off)}." if off else ""


def _failed(cells: Sequence[Cell]) -> str:
    failed = [f"{cell['label']} at {asked(cell['asked'])}" for cell in cells if cell.get("error")]
    return f"Without a result (the table says why): {_join(failed)}." if failed else ""


def _card(value: float, group: list[Cell]) -> Card:
    lines = [_line(order, metric) for metric in METRICS if (order := ranked(group, metric))]
    return Card(sparsity=asked(value), lines=lines)


def _line(order: list[Cell], metric: Metric) -> Line:
    first = order[0]
    ours = next((cell for cell in order if cell["method"] == OURS), None)
    rivals = [cell for cell in order[1:] if tied(first, cell, metric)]
    named = rivals or order[1:2]
    note = "the only one"
    if rivals:
        note = f"tied with {_join([cell['label'] for cell in rivals])}"
    elif named:
        note = f"next: {named[0]['label']} {metric.text(get(named[0], metric.path))}"
    if ours is not None and ours is not first and ours not in named:
        note += f"; {OURS} {metric.text(get(ours, metric.path))}"
    tokens = get(first, "speed.decode_tokens_per_second") if metric is DECODE else None
    if tokens is not None:
        note = f"{number(tokens)} tokens/s; {note}"
    return Line(metric=metric.short, value=metric.text(get(first, metric.path)), label=first["label"], note=note)


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
