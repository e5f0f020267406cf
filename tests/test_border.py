"""What comes from outside is refused in one sentence, before anything is built from it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from intraslice.border import MAX_DEPTH, check_plain, foreign, in_time, parse_json, parse_yaml, printable, read_json
from intraslice.errors import CheckpointError, RecipeError

BOMB = "[&a [x,x,x,x,x,x,x,x,x]" + "".join(
    f", &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("2024-01-01", "neither text, number"),
        ("{a: [1, !!binary aGVsbG8=]}", "value at a.1 that is neither"),
        ("!!set {a, b}", "neither text"),
        ("{[1, 2]: 3}", "is not YAML"),
        ("{2024-01-01: 3}", "no plain text"),
        ("!!python/object/apply:os.system [id]", "is not YAML"),
        ("&a [*a]", f"deeper than {MAX_DEPTH}"),
        ("[" * 3000 + "]" * 3000, f"deeper than {MAX_DEPTH}"),
        (f"{BOMB}]", "more than 100000 values"),
        ("9" * 10_000, "is not YAML"),
        ("0x" + "f" * 5000, "more than 64 bits"),
        ('"\\ud800"', "neither text"),
        ('"a\\0b"', "neither text"),
        ("2024-13-45", "is not YAML"),
    ],
)
def test_yaml_holds_plain_data(text: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "the recipe", RecipeError)
    assert sentence in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 100_000, f"deeper than {MAX_DEPTH}"),
        ("[" * 900 + "]" * 900, f"deeper than {MAX_DEPTH}"),
        ('{"a": 9223372036854775808}', "at a that is"),
        ("9" * 10_000, "is not JSON"),
        ('{"\\ud800": 1}', "no plain text"),
        ("[1,", "is not JSON"),
    ],
)
def test_json_holds_plain_data(text: str, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        parse_json(text, "the file", CheckpointError)


def test_json_files_are_objects_of_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=r"not UTF-8 text \(byte 7\)"):
        read_json(tmp_path / "a", "the file", CheckpointError)
    (tmp_path / "a").write_text("[1]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        read_json(tmp_path / "a", "the file", CheckpointError)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path, "the file", CheckpointError)


def test_ordinary_values_pass() -> None:
    content = {"a": [1, -2.5, True, None, "é"], "b": {"c": {}}}
    assert parse_yaml("{a: [1, -2.5, true, null, é], b: {c: {}}}", "x", RecipeError) == content
    check_plain(content, "x", RecipeError)


def test_whatever_a_library_raises_becomes_a_sentence() -> None:
    class PanicException(BaseException):
        """What Rust raises."""

    for raised, said in ((KeyError("x"), "KeyError 'x'"), (PanicException("a\nb"), "a b"), (AssertionError(), "Asser")):
        with (
            pytest.raises(CheckpointError, match=f"the file is broken: {said}"),
            foreign("the file is broken", CheckpointError),
        ):
            raise raised
    with pytest.raises(KeyboardInterrupt), foreign("x", CheckpointError):
        raise KeyboardInterrupt
    with pytest.raises(RecipeError, match="^ours$"), foreign("x", CheckpointError):
        raise RecipeError("ours")


def test_what_does_not_end_is_given_up() -> None:
    ended = threading.Event()
    with pytest.raises(CheckpointError, match="^the work takes more than 0.01 seconds, and was given up$"):
        in_time(ended.wait, 0.01, "the work", CheckpointError)
    ended.set()
    assert in_time(lambda: 7, 60, "the work", CheckpointError) == 7
    with pytest.raises(KeyError, match="x"):
        in_time(lambda: {}["x"], 60, "the work", CheckpointError)


def test_a_terminal_is_not_rewritten() -> None:
    assert printable("a\x1b[2Jb\u202ec\ud800", 100) == "a\\x1b[2Jb\\u202ec\\ud800"
    assert printable("x" * 50, 10) == "x" * 10 + "…"
