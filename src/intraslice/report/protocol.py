"""How the numbers were made: protocol, machine, versions, and the commands that make them again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from intraslice.numbers import DASH
from intraslice.report.document import DENSE, HEALED, Cell
from intraslice.report.words import asked

TITLES = {
    "text": "Perplexity text",
    "texts": "Texts",
    "tasks": "Tasks",
    "speed": "Speed",
    "calibration": "Calibration",
    "heal": "Healing",
}


@dataclass(frozen=True, kw_only=True)
class Block:
    """One part of the protocol.

    Attributes:
        title: its head.
        rows: names and texts; or none of them, and
        text: a text.
    """

    title: str
    rows: Sequence[tuple[str, str]] = ()
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Command:
    """The command that makes a method's cells again.

    Attributes:
        label: row name of the method.
        model: the model.
        sparsities: at which it was run.
        command: without the sparsity and the output.
    """

    label: str
    model: str
    sparsities: Sequence[str]
    command: str


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What `protocol.html` shows."""

    blocks: Sequence[Block]
    commands: Sequence[Command]


def build_protocol(comparison: dict[str, Any]) -> Protocol:
    """Return the section about protocol, machine, versions and commands."""
    protocol: dict[str, Any] = comparison.get("protocol") or {}
    blocks = [
        _block(TITLES.get(name) or name.replace("_", " ").capitalize(), value)
        for name, value in protocol.items()
        if value and name not in ("machine", "versions")
    ]
    if protocol.get("machine"):
        blocks.append(_block("Machine", protocol["machine"]))
    if protocol.get("versions"):
        blocks.append(_block("Versions", protocol["versions"]))
    return Protocol(blocks=blocks, commands=_commands(comparison["cells"]))


def _block(title: str, value: Any) -> Block:
    if isinstance(value, dict):
        return Block(title=title, rows=list(_flat(value)))
    return Block(title=title, text=_text(value))


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(item)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value) or DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return DASH if value is None else str(value)


def _commands(cells: Sequence[Cell]) -> list[Command]:
    found: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for cell in cells:
        if cell["method"] == DENSE or cell.get("sweep") or cell["label"].endswith(HEALED):
            continue
        parts = ["intraslice", "prune", cell["model"], "--method", cell["method"]]
        for name, value in (cell.get("options") or {}).items():
            parts += ["--set", f"{name}={_plain(value)}"]
        _, sparsities = found.setdefault((cell["model"], cell["label"]), (shlex.join(parts), []))
        sparsities.append(asked(cell["asked"]))
    return [
        Command(label=label, model=model, sparsities=sparsities, command=command)
        for (model, label), (command, sparsities) in found.items()
    ]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
