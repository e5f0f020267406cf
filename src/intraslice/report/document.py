"""The comparison document, which `comparison` writes and the report reads: what stands in it, and which cells are best.

A cell is one row of the table: a model, a method and a sparsity, with everything that was measured of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from intraslice.results.sites import OLD_FIELDS, site_errors

FORMAT = 1
"""The format of the document that this version reads and writes."""

DENSE = "dense"
"""The method, and the label, of the cell of a model that is not pruned."""

OURS = "intraslice"

HEALED = ", healed"
"""What the label of a cell ends in when its model was healed after the prune; the other cell has it without."""

SPEED = "speed.decode_speedup"
"""By which cells are compared: each was run in turns with the dense model. Tokens per second of cells that were
measured an hour apart would also compare how busy the machine was."""

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


def with_site_errors(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document whose layers have their errors by site, also where an earlier version has written them."""
    return {**document, "cells": [_with_site_errors(cell) for cell in document["cells"]]}


def _with_site_errors(cell: Cell) -> Cell:
    layers = [
        {**{name: value for name, value in layer.items() if name not in OLD_FIELDS}, "errors": site_errors(layer)}
        for layer in cell.get("layers") or []
    ]
    return {**cell, "layers": layers}


def by_sparsity(cells: Sequence[Cell]) -> dict[float, list[Cell]]:
    """Return the pruned cells that have a result, by the sparsity that was asked for."""
    groups: dict[float, list[Cell]] = {}
    for cell in cells:
        if cell["method"] != DENSE and not cell.get("error"):
            groups.setdefault(cell["asked"], []).append(cell)
    return dict(sorted(groups.items()))


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
