"""How the numbers were made: protocol, machine, versions, and the commands that make them again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from html import escape
from typing import Any

from intraslice.report.figures import DASH, DENSE, asked

TITLES = {"text": "Perplexity text", "tasks": "Tasks", "speed": "Speed", "calibration": "Calibration"}


def protocol_section(comparison: dict[str, Any]) -> str:
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
    return (
        '<section id="protocol"><h2>Protocol and how to reproduce</h2>'
        f'<div class="protocol">{"".join(blocks)}</div>{_commands(comparison)}'
        "<p>All numbers are part of this page, with six digits: the buttons at the top save them as CSV or JSON.</p>"
        "</section>"
    )


def _block(title: str, value: Any) -> str:
    if isinstance(value, dict):
        rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in _flat(value))
        return f"<div><h3>{escape(title)}</h3><dl>{rows}</dl></div>"
    return f"<div><h3>{escape(title)}</h3><p>{escape(_text(value))}</p></div>"


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(item)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value) or DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return DASH if value is None else str(value)


def _commands(comparison: dict[str, Any]) -> str:
    rows: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for cell in comparison["cells"]:
        if cell["method"] == DENSE or cell.get("sweep"):
            continue
        parts = ["intraslice", "prune", cell["model"], "--method", cell["method"]]
        for name, value in (cell.get("options") or {}).items():
            parts += ["--set", f"{name}={_plain(value)}"]
        _, sparsities = rows.setdefault((cell["model"], cell["label"]), (shlex.join(parts), []))
        sparsities.append(asked(cell["asked"]))
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td>{escape(model)}</td><td>{", ".join(sparsities)}</td>'
        f"<td><code>{escape(command)} --sparsity &hellip; -o &hellip;</code></td></tr>"
        for (model, label), (command, sparsities) in rows.items()
    )
    return (
        "<p><code>intraslice compare FILE.yaml</code> makes all of it, and goes on where it was stopped. One model "
        "at a time, with the calibration above:</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Commands"><table class="left">'
        '<caption class="sr">Commands</caption><thead><tr><th scope="col">Method</th><th scope="col">Model</th>'
        f'<th scope="col">Sparsities</th><th scope="col">Command</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
