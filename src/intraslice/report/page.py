"""The page: head, controls, one article per model with the sections that have data, and the data itself."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from intraslice.errors import RecipeError
from intraslice.report.document import (
    DENSE,
    FORMAT,
    OURS,
    SPEED,
    Cell,
    finite,
    get,
    pareto_front,
    plain,
    with_site_errors,
)
from intraslice.report.protocol import build_protocol
from intraslice.report.sections import build_article

if TYPE_CHECKING:
    from jinja2 import Environment

SCRIPTS = ("marks.js", "charts.js", "figures.js", "controls.js")
PAGE_BEGINS = '<!doctype html>\n<html lang="en">\n'
"""How a page begins, so that one can be told from another file."""

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
    comparison = with_site_errors(comparison)
    models = list(dict.fromkeys(cell["model"] for cell in comparison["cells"]))
    models += [name for name in comparison.get("analysis") or {} if name not in models]
    labels = _labels(comparison["cells"])
    script = "".join(_asset(name) for name in SCRIPTS)
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=str(comparison["title"]),
            facts=_facts(comparison, models, labels),
            models=models,
            labels=[label for label in labels if label != DENSE],
            articles=[build_article(index, name, comparison) for index, name in enumerate(models)],
            protocol=build_protocol(comparison),
            comparison=_json(plain(comparison)),
            view=_json(_view(comparison, models, labels)),
            style=_asset("report.css"),
            script=script,
            policy=_policy(script),
            ours=OURS,
        )
    )


@cache
def _environment() -> Environment:
    # Comparisons take their constants from this package; only who renders a page waits for jinja2.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("intraslice.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _asset(name: str) -> str:
    return (files("intraslice.report") / "assets" / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    # Only this very script may run, and nothing may be fetched, whatever a label or an error message contains.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = ("default-src 'none'", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'", "base-uri 'none'")
    return "; ".join(rules)


def _json(value: Any) -> str:
    # "<" would end the element (</script>) or start a comment in it (<!--).
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _facts(comparison: dict[str, Any], models: Sequence[str], labels: Sequence[str]) -> list[str]:
    methods = sum(label != DENSE for label in labels)
    protocol = comparison.get("protocol") or {}
    facts = [
        str(comparison.get("created") or ""),
        models[0] if len(models) == 1 else f"{len(models)} models",
        f"{methods} method{'' if methods == 1 else 's'}",
        str(protocol.get("machine") or ""),
    ]
    return [fact for fact in facts if fact]


def _labels(cells: Sequence[Cell]) -> list[str]:
    """Return the row names in the order of their colors: ours first, then as they appear."""
    main = [cell for cell in cells if not cell.get("sweep")]
    ours = [cell["label"] for cell in main if cell["method"] == OURS]
    return list(dict.fromkeys([*ours, *(DENSE if cell["method"] == DENSE else cell["label"] for cell in main)]))


def _view(comparison: dict[str, Any], models: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    cells = [cell for cell in comparison["cells"] if not cell.get("sweep") and not cell.get("error")]
    return {
        "models": list(models),
        "labels": [label for label in labels if label != DENSE],
        "ours": OURS,
        "dense": DENSE,
        "fronts": {
            name: {metric: _front(cells, name, metric, sign) for metric, sign in FRONT_METRICS.items()}
            for name in models
        },
    }


def _front(cells: Sequence[Cell], model: str, metric: str, sign: int) -> list[str]:
    """Return the keys of the cells of a model that none beats in both decode speed and this metric, fastest first."""
    found = [
        (cell["key"], speed, sign * value)
        for cell in cells
        if cell["model"] == model
        and (speed := get(cell, SPEED)) is not None
        and (value := finite(cell.get(metric))) is not None
    ]
    return [found[index][0] for index in pareto_front([(speed, cost) for _, speed, cost in found])]
