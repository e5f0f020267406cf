"""Options that are read, and options that are not: named choices, and what each of them reads. No torch.

A method's options are dataclasses in sections. Some options are choices by name, listed in a table with one row per
name; a row says which other options it reads. From the options that are always read one follows the rows that are
chosen, and what is not reached that way would have no effect: the recipe refuses it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """One named choice.

    Attributes:
        summary: what it does, for help and docs.
        function: where it is implemented, "package.module:name"; "" when the choice is not one function.
        reads: dotted names of the options that it reads besides.
        excludes: dotted names of options that have no effect with it, whatever else would read them.
        paper: where it comes from.
    """

    summary: str
    function: str = ""
    reads: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    paper: str = ""

    def load(self) -> Callable[..., Any]:
        """Return the function; imports its module."""
        return load(self.function)


@dataclass(frozen=True)
class OneOf:
    """Annotation of an option that is a choice: the names of the table are its values.

    Attributes:
        table: rows by name.
        allowed: which of its rows this option may name; None allows all.
    """

    table: Mapping[Any, Row]
    allowed: Callable[[Any], bool] | None = None

    def names(self) -> tuple[str, ...]:
        """Return the values that the option may have."""
        return tuple(name for name, row in self.table.items() if self.allowed is None or self.allowed(row))


def load(path: str) -> Any:
    """Return what "package.module:name" names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def option_values(options: Any) -> dict[str, Any]:
    """Return the values of a dataclass of sections by dotted name."""
    values: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            values.update({f"{field.name}.{name}": inner for name, inner in option_values(value).items()})
        else:
            values[field.name] = value
    return values


def read_names(values: Mapping[str, Any], roots: tuple[str, ...], choices: Mapping[str, Mapping[Any, Row]]) -> set[str]:
    """Return the names of the options that have an effect, given the values of all.

    Args:
        values: of all options, by dotted name.
        roots: options that are always read.
        choices: the table of each option that is a choice.
    """
    found: set[str] = set()
    excluded: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        row = choices.get(name, {}).get(values[name])
        if row is not None:
            waiting.extend(row.reads)
            excluded.update(row.excludes)
    return found - excluded


def readers(name: str, choices: Mapping[str, Mapping[Any, Row]]) -> Iterator[str]:
    """Yield "option = value" for each choice that reads an option."""
    for option, table in choices.items():
        yield from (f"{option} = {str(value).lower()}" for value, row in table.items() if name in row.reads)
