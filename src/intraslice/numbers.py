"""Numbers for people: how they are written on the screen and in the report. A dash stands for what is not known."""

from __future__ import annotations

import re

DASH = "\u2013"

_LARGEST = 1 << 63
_QUANTITY = re.compile(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e\+?[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_SIZES = {
    **{f"{letter}{end}": factor for letter, factor in _COUNTS.items() if letter != "B" for end in ("", "B")},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}


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


def parse_count(value: object) -> int | None:
    """Return 6000000000 for "6B" (K, M, B or G, T); None for what is no such number, or not above 0."""
    return _parse(value, _COUNTS)


def parse_size(value: object) -> int | None:
    """Return the bytes of "4GB" (kB, MB, GB, TB; KiB to TiB in steps of 1024); None for what is no size above 0."""
    return _parse(value, _SIZES)


def _parse(value: object, units: dict[str, int]) -> int | None:
    # bool is an int too, and 6e9 comes from YAML as a text.
    found = None if isinstance(value, bool) else _QUANTITY.fullmatch(str(value).strip())
    if found is None or found[2].upper() not in units:
        return None
    parsed = float(found[1].replace(",", "").replace("_", "")) * units[found[2].upper()]
    return int(parsed) or None if parsed < _LARGEST else None
