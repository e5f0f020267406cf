"""How the report writes percentages and sparsities; all other numbers are written as on the screen."""

from __future__ import annotations

from functools import partial

from intraslice.numbers import DASH
from intraslice.numbers import percent as percent_with

# A line must not end between a number and its sign.
SPACE = "\u00a0"

percent = partial(percent_with, space=SPACE)


def asked(value: float | None) -> str:
    """Return a requested sparsity as it would be said: 30 %, 12.5 %."""
    return DASH if value is None else f"{100 * value:.4g}{SPACE}%"


def key(value: float) -> str:
    """Return a sparsity as the data of the page has it: selectors and rows find their cells by it."""
    return f"{value:.6g}"
