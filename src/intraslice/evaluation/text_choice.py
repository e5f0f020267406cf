"""Which windows of which text a model is judged on, as it is written: `NAME=SOURCE@FIRST-LAST`. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from intraslice.data.text import FILE_TYPES, NAMED_TEXTS, check_text
from intraslice.errors import RecipeError
from intraslice.names import expanded

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_WINDOWS = re.compile(r"(?P<source>.+)@(?P<first>[0-9]{1,9})(?:-(?P<last>[0-9]{0,9}))?")


@dataclass(frozen=True)
class TextChoice:
    """One text to judge a model on.

    Attributes:
        name: of the domain, in tables.
        source: name of a text (its test split), or a file.
        first: number of the first window.
        windows: at most this many; None takes all.
    """

    name: str
    source: str
    first: int = 0
    windows: int | None = None


def with_base(given: str, base: Path) -> str:
    """Return the same text with a path that starts at `base`, if it is a file there."""
    if given in NAMED_TEXTS:
        return given
    before, sign, rest = given.partition("=")
    named = bool(sign) and _NAME.fullmatch(before) is not None and not (base / expanded(given)).is_file()
    name, source = (f"{before}=", rest) if named else ("", given)
    match = _WINDOWS.fullmatch(source)
    file = match["source"] if match and not (base / expanded(source)).is_file() else source
    is_file = Path(file).suffix.lower() in FILE_TYPES or "/" in file
    return f"{name}{base / expanded(file)}{source[len(file) :]}" if is_file else given


def parse_text(given: str, windows: int | None = None) -> TextChoice:
    """Return what `NAME=SOURCE@FIRST-LAST` means; the name and the windows may be left out.

    An existing file or a known text is taken as it is, whatever signs are in its name.

    Args:
        given: for example "qa=data/qa.txt@0-5", "wikitext2" or "notes.txt@4-".
        windows: at most this many, where the text itself names no windows.

    Raises:
        CalibrationError: the text is unknown or missing.
        RecipeError: the name or the windows make no sense.
    """
    name, source, first = "", given, 0
    if not _is_text(source):
        before, sign, rest = source.partition("=")
        if sign and _NAME.fullmatch(before):
            name, source = before, rest
        match = None if _is_text(source) else _WINDOWS.fullmatch(source)
        if match:
            source, first = match["source"], int(match["first"])
            last = first if match["last"] is None else int(match["last"]) if match["last"] else None
            if last is not None and last < first:
                raise RecipeError(f"the windows of {given!r} end before they start; write them as FIRST-LAST, from 0.")
            windows = windows if last is None else last - first + 1
    check_text(source)
    return TextChoice(name or _name_of(source), source, first, windows)


def is_plain(given: str) -> bool:
    """Say whether a text is written without a name and without windows; also when there is no such text."""
    return _is_text(given) or not ("=" in given or _WINDOWS.fullmatch(given))


def parse_texts(given: Sequence[str], windows: int | None = None) -> list[TextChoice]:
    """Return several texts, whose names differ.

    Raises:
        CalibrationError: a text is unknown or missing.
        RecipeError: a name or windows make no sense, two have the same name, or there is none.
    """
    found = [parse_text(one, windows) for one in given]
    if not found:
        raise RecipeError("no text is named; name one with --text.")
    names = [choice.name for choice in found]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"two texts are called {name!r}; give one of them another name, as in NAME={name}.")
    return found


def _is_text(source: str) -> bool:
    return source in NAMED_TEXTS or expanded(source).is_file()


def _name_of(source: str) -> str:
    """Return the name of a source without one: that of the file."""
    stem = source if source in NAMED_TEXTS else Path(source).stem
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.") or "text"
