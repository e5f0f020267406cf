"""The page: head, controls, one article a model with the sections that have data, and the data itself."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from intraslice.errors import RecipeError
from intraslice.report.figures import DENSE, OURS, SPEED, Cell, finite, get, pareto_front, plain
from intraslice.report.protocol import protocol_section
from intraslice.report.sections import article

FORMAT = 1
SCRIPTS = ("marks.js", "charts.js", "figures.js", "controls.js")
FRONT_METRICS = {"perplexity": 1, "average": -1}


def render_report(comparison: dict[str, Any]) -> str:
    """Return one self-contained HTML page that shows a comparison.

    Args:
        comparison: the comparison document, as `intraslice compare` writes it.

    Returns:
        HTML without any address outside of itself; the same document gives the same page.

    Raises:
        RecipeError: the document has another format.
    """
    if comparison.get("format") != FORMAT:
        raise RecipeError(
            f"the comparison has format {comparison.get('format')!r}; this version reads format {FORMAT}: "
            "write it again with `intraslice compare`."
        )
    models = list(dict.fromkeys(cell["model"] for cell in comparison["cells"]))
    models += [name for name in comparison.get("analysis") or {} if name not in models]
    articles = "".join(article(index, name, comparison, alone=len(models) == 1) for index, name in enumerate(models))
    script = "".join(_asset(name) for name in SCRIPTS)
    title = escape(str(comparison["title"]))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">'
        f"<style>{_asset('report.css')}</style></head><body>"
        f"{_header(comparison, models)}{_controls(comparison, models)}"
        f"<main>{articles or '<p>This comparison has no cells yet.</p>'}{protocol_section(comparison)}</main>"
        f"{_data('comparison', plain(comparison))}{_data('view', _view(comparison, models))}"
        f"<script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (files("intraslice.report") / "assets" / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    # Only this very script may run, and nothing may be fetched, whatever a label or an error message contains.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = ("default-src 'none'", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'", "base-uri 'none'")
    return "; ".join(rules)


def _data(name: str, value: Any) -> str:
    # "<" would end the element (</script>) or start a comment in it (<!--).
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _header(comparison: dict[str, Any], models: Sequence[str]) -> str:
    labels = _labels(comparison["cells"])
    methods = sum(label != DENSE for label in labels)
    protocol = comparison.get("protocol") or {}
    facts = [
        str(comparison.get("created") or ""),
        models[0] if len(models) == 1 else f"{len(models)} models",
        f"{methods} method{'' if methods == 1 else 's'}",
        str(protocol.get("machine") or ""),
    ]
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts if fact)
    return f'<header><h1>{escape(str(comparison["title"]))}</h1><ul class="facts">{items}</ul></header>'


def _controls(comparison: dict[str, Any], models: Sequence[str]) -> str:
    options = "".join(f'<option value="{index}">{escape(name)}</option>' for index, name in enumerate(models))
    select = (
        f'<label class="pick"><span>Model </span><select id="model" aria-label="Model">{options}</select></label>'
        if len(models) > 1
        else ""
    )
    chips = "".join(
        f'<button type="button" class="chip" aria-pressed="true" data-label="{escape(label)}">'
        f'<span data-swatch="{escape(label)}">{escape(label)}</span></button>'
        for label in _labels(comparison["cells"])
        if label != DENSE
    )
    return (
        f'<nav class="bar" aria-label="Controls">{select}'
        f'<div class="chips" role="group" aria-label="Methods shown in the charts">{chips}</div>'
        '<div class="actions"><button type="button" id="csv"><span class="wide">Download </span>CSV</button>'
        '<button type="button" id="json">JSON</button>'
        '<button type="button" id="theme">Dark</button></div></nav>'
        "<noscript><p>Charts, sorting and downloads need JavaScript; the tables below do not.</p></noscript>"
    )


def _labels(cells: Sequence[Cell]) -> list[str]:
    """Row names in the order of their colours: ours first, then as they appear."""
    main = [cell for cell in cells if not cell.get("sweep")]
    ours = [cell["label"] for cell in main if cell["method"] == OURS]
    return list(dict.fromkeys([*ours, *(DENSE if cell["method"] == DENSE else cell["label"] for cell in main)]))


def _view(comparison: dict[str, Any], models: Sequence[str]) -> dict[str, Any]:
    cells = [cell for cell in comparison["cells"] if not cell.get("sweep") and not cell.get("error")]
    return {
        "models": list(models),
        "labels": [label for label in _labels(comparison["cells"]) if label != DENSE],
        "ours": OURS,
        "dense": DENSE,
        "fronts": {
            name: {metric: _front(cells, name, metric, sign) for metric, sign in FRONT_METRICS.items()}
            for name in models
        },
    }


def _front(cells: Sequence[Cell], model: str, metric: str, sign: int) -> list[str]:
    """Keys of the cells of a model that are not beaten in both decode speed and this metric, fastest first."""
    found = [
        (cell["key"], speed, sign * value)
        for cell in cells
        if cell["model"] == model
        and (speed := get(cell, SPEED)) is not None
        and (value := finite(cell.get(metric))) is not None
    ]
    return [found[index][0] for index in pareto_front([(speed, cost) for _, speed, cost in found])]
