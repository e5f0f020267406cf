"""A command that refuses what it was given: one line on standard error, and status 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from intraslice.cli.app import MAX_SENTENCE, main

Refused = Callable[..., str]
"""Takes the arguments of a command, and returns the line."""


def refusal(capfd: Any, *arguments: object) -> str:
    """Run a command, check for status 2 and one line on standard error, and return that line.

    Args:
        capfd: pytest's capture of both outputs.
        arguments: of the command.
    """
    capfd.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line]
    assert line.startswith("error: ") and len(line) <= MAX_SENTENCE + 20
    return line
