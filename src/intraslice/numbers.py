"""Numbers for people: how they are written on the screen and in the report. A dash stands for what is not known."""

from __future__ import annotations

DASH = "\u2013"


def percent(fraction: float | None, digits: int = 1, *, space: str = " ") -> str:
    """Return 0.314 as "31.4 %", with `space` before the sign."""
    return DASH if fraction is None else f"{100 * fraction:.{digits}f}{space}%"


def number(value: float | None, digits: int = 1) -> str:
    """Return a number with separators of thousands."""
    return DASH if value is None else f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """Return 134515008 as "134,515,008"."""
    return number(value, 0)


def short_count(value: float | None) -> str:
    """Return 134515008 as "134.52 M": a count in millions or billions."""
    if value is None:
        return DASH
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:,.2f} {name}"
    return count(value)


def size(num_bytes: float | None) -> str:
    """Return a number of bytes in the decimal unit that suits it: 1 MB is 10^6 bytes."""
    if num_bytes is None:
        return DASH
    for unit, name, digits in ((1e12, "TB", 2), (1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1)):
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.{digits}f} {name}"
    return f"{num_bytes:,.0f} B"


def times(value: float | None) -> str:
    """Return a ratio, such as 1.31x with a real multiplication sign."""
    return DASH if value is None else f"{value:.2f}\u00d7"


def perplexity(value: float | None) -> str:
    """Return about four digits of a perplexity."""
    if value is None:
        return DASH
    digits = 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:,.{digits}f}"


def duration(seconds: float | None) -> str:
    """Return seconds as seconds, minutes or hours."""
    if seconds is None:
        return DASH
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
