"""What comes from outside is checked here, once, where it enters: before anything is built from it.

Two rules hold for every file, line and setting that somebody else may have written. It is plain data within limits
(`read_json`, `parse_json`, `parse_yaml`): a size, a depth, integers of 64 bits, text that is text. And what a library
makes of it is asked for inside of `foreign`, which turns whatever the library raises into one sentence of ours, because
nobody can list what it may raise. Code behind the border trusts what it is given.
"""

from __future__ import annotations

import json
import math
import queue
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from intraslice.errors import IntraSliceError, one_line

MAX_JSON_BYTES = 1 << 28
"""A file of JSON is at most this large: the index of a model with a million tensors is smaller."""
MAX_YAML_BYTES = 1 << 18
"""A recipe or a comparison is at most this large; the parser of YAML takes seconds for a megabyte."""
MAX_DEPTH = 64
"""Lists and objects within each other."""
MAX_ENTRIES = 10_000_000
"""Values of one JSON file; of YAML, where an alias repeats a value for two letters, `MAX_YAML_ENTRIES`."""
MAX_YAML_ENTRIES = 100_000
MAX_REASON = 200
"""Characters of a library's reason that go into a sentence."""

MAX_SECONDS = 50
"""What a tokenizer may take for a short text or a conversation; ordinary ones take less than a thousandth of one."""

_MAX_INTEGER = (1 << 63) - 1
_Checked = TypeVar("_Checked")
_Result = TypeVar("_Result")
_Error = type[IntraSliceError]


@contextmanager
def foreign(what: str, error: _Error, advice: str = "") -> Iterator[None]:
    """Turn whatever a library raises while it reads something from outside into one sentence.

    The only place that catches everything: around single calls of libraries, never around work of our own.

    Args:
        what: what is read and what is wrong with it, for example "config.json of 'x' is not valid".
        error: the class of our error.
        advice: what to do, put behind the reason.

    Raises:
        IntraSliceError: of the class `error`; one of ours passes as it is.
    """
    try:
        yield
    except (IntraSliceError, MemoryError):
        raise
    except Exception as found:
        raise error(f"{what}: {reason(found)}{advice}") from found
    except BaseException as found:
        # What Rust calls a panic derives from BaseException, so that nobody notices.
        if type(found).__name__ != "PanicException":
            raise
        raise error(f"{what}: {reason(found)}{advice}") from found


def in_time(work: Callable[[], _Result], seconds: float, what: str, error: _Error) -> _Result:
    """Return what a library makes of something from outside, or give up when that takes far too long.

    A thread that does not end cannot be ended either: it works on beside the sentence, until the process is over. What
    never lets go of the interpreter (a regular expression of Python itself) cannot be given up on.

    Args:
        work: the call of the library.
        seconds: after these it is given up.
        what: what messages call it.
        error: the class of our error.

    Raises:
        IntraSliceError: it is given up. What the library raises comes through.
    """
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((work(), None))
        except BaseException as found:
            results.put((None, found))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, found = results.get(timeout=seconds)
    except queue.Empty:
        raise error(f"{what} takes more than {seconds:g} seconds, and was given up") from None
    if found is not None:
        raise found
    return value


def reason(error: BaseException) -> str:
    """Return what a library says is wrong, in one short line; the name of the error where it says nothing of use."""
    # Checks of whole objects are wrapped in an error that begins with the name of a function.
    if type(error).__name__ == "StrictDataclassClassValidationError" and error.__cause__ is not None:
        error = error.__cause__
    said = one_line(error)
    if isinstance(error, KeyError | AssertionError) or not said:
        said = f"{type(error).__name__} {said}".strip()
    return said if len(said) <= MAX_REASON else f"{said[:MAX_REASON]}…"


def read_text(path: Path, what: str, error: _Error, *, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Read a file of text.

    Args:
        path: the file.
        what: what messages call it, for example "config.json of 'x'".
        error: the class of our error.
        max_bytes: a larger file is refused unread.

    Raises:
        IntraSliceError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise error(f"{what} is larger than {max_bytes} bytes, and no such file needs to be")
        return content.decode("utf-8-sig")
    except OSError as found:
        raise error(f"{what} cannot be read: {found.strerror or found}") from found
    except UnicodeDecodeError as found:
        raise error(f"{what} cannot be read: it is not UTF-8 text (byte {found.start})") from found


def read_json(path: Path, what: str, error: _Error) -> dict[str, Any]:
    """Read a file that holds one JSON object, within the limits of this module.

    Raises:
        IntraSliceError: with what is wrong.
    """
    content = parse_json(read_text(path, what, error), what, error)
    if not isinstance(content, dict):
        raise error(f"{what} is not a JSON object")
    return content


def parse_json(text: str, what: str, error: _Error) -> Any:
    """Return the value of a JSON text, within the limits of this module.

    Raises:
        IntraSliceError: with what is wrong.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise error(f"{what} nests lists and objects deeper than {MAX_DEPTH} levels") from None
    except ValueError as found:
        raise error(f"{what} is not JSON: {reason(found)}") from found
    check_plain(content, what, error)
    return content


def parse_yaml(text: str, what: str, error: _Error) -> Any:
    """Return the value of a YAML text, which holds nothing that JSON could not, within the limits of this module.

    Raises:
        IntraSliceError: with what is wrong.
    """
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        # Found out before it is parsed, which takes the square of the depth. Brackets in quotes count as well.
        raise error(f"{what} nests lists and objects deeper than {MAX_DEPTH} levels")
    try:
        content = yaml.safe_load(text)
    except RecursionError:
        raise error(f"{what} nests lists and objects deeper than {MAX_DEPTH} levels") from None
    # The second: a date without such a day, or an integer of too many digits.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as found:
        raise error(f"{what} is not YAML: {reason(found)}") from found
    check_plain(content, what, error, max_entries=MAX_YAML_ENTRIES, nul=False)
    return content


def check_plain(content: Any, what: str, error: _Error, *, max_entries: int = MAX_ENTRIES, nul: bool = True) -> None:
    """Refuse what is not plain data: JSON types, few levels, integers of 64 bits, text that UTF-8 can hold.

    Args:
        content: what a parser has made.
        what: what messages call it.
        error: the class of our error.
        max_entries: values in it, those that are named twice counted twice.
        nul: whether a text may hold NUL, which no name of a file can.

    Raises:
        IntraSliceError: with the place of the first such value.
    """
    left: list[tuple[Any, tuple[Any, ...]]] = [(content, ())]
    entries = 0
    while left:
        value, place = left.pop()
        entries += 1
        if entries > max_entries:
            raise error(f"{what} holds more than {max_entries} values")
        if isinstance(value, dict | list) and len(place) >= MAX_DEPTH:
            raise error(f"{what} nests lists and objects deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str | int | float | bool | None) or _is_bad(key, nul):
                    raise error(f"{what} has a name{_at(place)} that is no plain text: {_shown(key)}")
            left += [(inner, (*place, key)) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [(inner, (*place, index)) for index, inner in enumerate(value)]
        elif _is_bad(value, nul):
            raise error(
                f"{what} has a value{_at(place)} that is neither text, number, truth value nor a list or object of "
                f"these: {_shown(value)}"
            )


def _is_bad(value: Any, nul: bool) -> bool:
    if isinstance(value, str):
        return not (nul or "\0" not in value) or not _is_utf8(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return not -_MAX_INTEGER - 1 <= value <= _MAX_INTEGER
    return not (value is None or isinstance(value, bool | float))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _at(place: tuple[Any, ...]) -> str:
    return f" at {'.'.join(map(_shown, place))[:MAX_REASON]}" if place else ""


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        return "an integer of more than 64 bits"
    text = value if isinstance(value, str) and value.isidentifier() else ascii(value)
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}…"


def check_schema(schema: type[_Checked], content: Any, what: str, error: _Error) -> _Checked:
    """Return a content as an instance of a pydantic model or dataclass, types taken literally.

    Raises:
        IntraSliceError: with the first field that is missing, unknown or of another type.
    """
    try:
        return TypeAdapter(schema).validate_json(json.dumps(content), strict=True)
    except ValidationError as found:
        first = found.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise error(f"{what} is not what it should be: {place[:MAX_REASON]}: {one_line(first['msg'])}") from None


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def printable(text: str, limit: int) -> str:
    """Return a text that a terminal can be given: no control characters, which could rewrite the screen, cut.

    Args:
        text: perhaps with words of a stranger in it.
        limit: at most this many characters.
    """
    escaped = _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)
    return escaped if len(escaped) <= limit else f"{escaped[:limit]}…"


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
