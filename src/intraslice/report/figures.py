"""Numbers of a comparison: which are there, how they are written, which cells form the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

OURS = "intraslice"
DENSE = "dense"
DASH = "\u2013"

SPEED = "speed.decode_speedup"
"""By which cells are compared: each was run in turns with the dense model. Tokens/s of cells that were measured an hour
apart would also compare how busy the machine was."""

Cell = dict[str, Any]


def finite(value: Any) -> float | None:
    """Return a number that can be drawn, or None for what was not measured, is infinite or is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def get(cell: Cell, path: str | Sequence[str]) -> float | None:
    """Return the number at a path of a cell (dotted, or its names one by one), or None."""
    value: Any = cell
    for name in path.split(".") if isinstance(path, str) else path:
        value = value.get(name) if isinstance(value, dict) else None
    return finite(value)


def plain(value: Any) -> Any:
    """Return JSON types with six significant digits; NaN and infinities, which JSON does not know, become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other point beats, fastest first.

    Args:
        points: (gain, cost): a point beats another if it has no smaller gain and no larger cost, and is not equal.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1])):
        best = points[front[-1]] if front else None
        if best is None or points[index][1] < best[1] or points[index] == best:
            front.append(index)
    return front


def perplexity(value: float | None) -> str:
    """Return about four digits of a perplexity."""
    if value is None:
        return DASH
    digits = 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share as a percentage."""
    return DASH if value is None else f"{100 * value:.{digits}f}\u00a0%"


def asked(value: float | None) -> str:
    """Return a requested sparsity as it would be said: 30 %, 12.5 %."""
    return DASH if value is None else f"{100 * value:.4g}\u00a0%"


def key(value: float) -> str:
    """Return a sparsity as the page's data has it: selectors and rows find their cells by it."""
    return f"{value:.6g}"


def number(value: float | None, digits: int = 1) -> str:
    """Return a number with separators of thousands."""
    return DASH if value is None else f"{value:,.{digits}f}"


def times(value: float | None) -> str:
    """Return a ratio, such as 1.31x with a real multiplication sign."""
    return DASH if value is None else f"{value:.2f}\u00d7"


def count(value: float | None) -> str:
    """Return a count in millions or billions."""
    if value is None:
        return DASH
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:,.2f} {name}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Return bytes in decimal units."""
    if value is None:
        return DASH
    for unit, name, digits in ((1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1)):
        if value >= unit:
            return f"{value / unit:,.{digits}f} {name}"
    return f"{value:,.0f} B"


def duration(value: float | None) -> str:
    """Return seconds as seconds, minutes or hours."""
    if value is None:
        return DASH
    seconds = round(value)
    if seconds < 100:
        return f"{value:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
