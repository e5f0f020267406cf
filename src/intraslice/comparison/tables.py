"""The table of a comparison as Markdown, CSV and JSON, and all files that are written from its document."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intraslice.errors import OutputError
from intraslice.evaluation.task_data import task_score
from intraslice.files import check_replaced, write_text
from intraslice.report.document import DENSE

DOCUMENT_FILE = "comparison.json"
TABLE_FORMS = (".md", ".csv", ".json")
TABLE_BEGINS = {".md": ("# ",), ".csv": ("model,",), ".json": ('[\n {\n  "model":', "[]\n")}
"""How a table begins, so that one can be told from another file; the last one has no rows yet."""


def check_outputs(folder: Path) -> None:
    """Refuse a folder where files that no comparison has written have the names of its results.

    Raises:
        OutputError: with the first of them.
    """
    from intraslice.report import PAGE_BEGINS

    check_replaced(folder / DOCUMENT_FILE, '{\n "format":')
    for suffix, begins in TABLE_BEGINS.items():
        check_replaced(folder / f"table{suffix}", *begins)
    check_replaced(folder / "report.html", PAGE_BEGINS)


def write_outputs(document: dict[str, Any], folder: Path) -> None:
    """Write comparison.json, the table in three forms and the report."""
    from intraslice.report import render_report

    write_text(folder / DOCUMENT_FILE, json.dumps(document, indent=1) + "\n")
    for suffix in TABLE_FORMS:
        write_text(folder / f"table{suffix}", table_text(document, suffix))
    write_text(folder / "report.html", render_report(document))


def table_text(document: Mapping[str, Any], suffix: str) -> str:
    """Return the table in the form that a file name ends in: ".md", ".csv" or ".json".

    Raises:
        OutputError: it ends in something else.
    """
    if suffix == ".md":
        return to_markdown(document)
    if suffix == ".csv":
        return to_csv(table_rows(document))
    if suffix == ".json":
        return json.dumps(table_rows(document), indent=1) + "\n"
    raise OutputError(f"a table cannot be written as {suffix!r}; name a file that ends in {', '.join(TABLE_FORMS)}.")


def table_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the main table: model by model, the dense one first, then by sparsity and method.

    All rows have the same columns; None stands for what was not measured, `error` says why a cell failed.
    """
    cells = [cell for cell in document["cells"] if cell["sweep"] is None]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    labels = list(dict.fromkeys(cell["label"] for cell in cells))

    def place(cell: Mapping[str, Any]) -> tuple[Any, ...]:
        return models.index(cell["model"]), cell["label"] != DENSE, cell["asked"], labels.index(cell["label"])

    tasks = task_names(document)
    texts = text_names(document)
    return [_row(cell, texts, tasks) for cell in sorted(cells, key=place)]


def text_names(document: Mapping[str, Any]) -> list[str]:
    """Return the names of the texts that are measured besides the one of the main column, that one first; or none."""
    return [text["name"] for text in document["protocol"].get("texts") or ()]


def task_names(document: Mapping[str, Any]) -> list[str]:
    """Return the tasks of the document, in the order in which they were asked for."""
    return list(dict.fromkeys((document["protocol"].get("tasks") or {}).get("names", ())))


def _row(cell: Mapping[str, Any], texts: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
    prune, speed, scores = (cell[name] or {} for name in ("prune", "speed", "tasks"))
    paired = (cell.get("paired") or {}).get("average") or {}
    return {
        "model": cell["model"],
        "method": cell["label"],
        "asked": cell["asked"],
        "sparsity": cell["sparsity"],
        "parameters": cell["parameters"],
        "weight_bytes": cell["weight_bytes"],
        "perplexity": cell["perplexity"],
        # The first one is that of the column before.
        **{f"{PERPLEXITY_OF}{name}": (cell.get("texts") or {}).get(name) for name in texts[1:]},
        **{f"{GAP_OF}{name}": (cell.get("gaps") or {}).get(name) for name in texts},
        "mean_gap": cell.get("mean_gap"),
        "mean_kl": cell.get("mean_kl"),
        "mean_agreement": cell.get("mean_agreement"),
        **{
            name: task_score(scores[name]["acc"], scores[name]["acc_norm"]) if name in scores else None
            for name in tasks
        },
        "average": cell["average"],
        **{f"healed_{name}": (cell.get("healed") or {}).get(name) for name in ("perplexity", "mean_gap", "average")},
        "difference": paired.get("difference"),
        "difference_stderr": paired.get("stderr"),
        "prune_seconds": prune.get("seconds", {}).get("total"),
        "peak_memory_bytes": prune.get("peak_memory_bytes"),
        "prefill_tokens_per_second": speed.get("prefill_tokens_per_second"),
        "decode_tokens_per_second": speed.get("decode_tokens_per_second"),
        "prefill_speedup": speed.get("prefill_speedup"),
        "decode_speedup": speed.get("decode_speedup"),
        "error": cell.get("error"),
    }


def _score(task: Mapping[str, Any] | None) -> float | None:
    return None if task is None else task_score(task["acc"], task["acc_norm"])


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with full precision; empty where nothing was measured."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


PERPLEXITY_OF, GAP_OF = "perplexity of ", "gap on "
_TITLES = {
    "mean_gap": "mean gap",
    "mean_kl": "mean KL",
    "mean_agreement": "same token",
    "healed_perplexity": "healed, perplexity",
    "healed_mean_gap": "healed, mean gap",
    "healed_average": "healed, average",
    "difference": "minus dense",
    "difference_stderr": "paired \u00b1",
    "weight_bytes": "weights, MB",
    "prune_seconds": "prune, s",
    "peak_memory_bytes": "peak, MB",
    "prefill_tokens_per_second": "prefill, tok/s",
    "decode_tokens_per_second": "decode, tok/s",
    "prefill_speedup": "prefill x",
    "decode_speedup": "decode x",
}
_WORDS = ("model", "method")


def _text(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column in _WORDS:
        return str(value).replace("|", "\\|")
    if column == "parameters":
        return f"{value:,}"
    if column.endswith("_bytes"):
        return f"{value / 1e6:,.1f}"
    if column == "asked":
        return f"{value:g}"
    if column in ("sparsity", "perplexity", "healed_perplexity") or column.endswith("_speedup"):
        return f"{value:.4f}" if column == "sparsity" else f"{value:.2f}"
    if column.startswith(PERPLEXITY_OF):
        return f"{value:.2f}"
    if column.startswith(GAP_OF) or column in ("mean_gap", "healed_mean_gap", "mean_kl"):
        return f"{value:.3f}"
    if column.endswith("_per_second") or column == "prune_seconds":
        return f"{value:,.1f}"
    # Accuracies, in percent as papers print them.
    return f"{100 * value:.1f}"


def to_markdown(document: Mapping[str, Any]) -> str:
    """Return the title, how it was measured, the main table, failures and sweeps as Markdown."""
    parts = [f"# {document['title']}", _protocol_lines(document["protocol"]), markdown_table(document)]
    failed = [cell for cell in document["cells"] if cell.get("error")]
    if failed:
        lines = [f"- {_failed_name(cell)}: {cell['error']}" for cell in failed]
        parts.append("\n".join(["Failed:", "", *lines]))
    if any(cell["prune"] for cell in document["cells"]):
        parts.append(
            "Variants that rank by mask gradients share one gradient pass per model; its seconds count in each of them."
        )
    parts.extend(_sweep_tables(document))
    return "\n\n".join(parts) + "\n"


def markdown_table(document: Mapping[str, Any]) -> str:
    """Return the main table alone; columns that nothing was measured for are left out."""
    rows = table_rows(document)
    measured = {name for row in rows for name, value in row.items() if value is not None}
    columns = [name for name in (rows[0] if rows else ()) if name in measured and name != "error"]
    body = [[_text(column, row[column]) or _blank(row, column) for column in columns] for row in rows]
    return _table([_TITLES.get(name, name) for name in columns], body, len(_WORDS)) if rows else ""


def _blank(row: Mapping[str, Any], column: str) -> str:
    return "failed" if row["error"] is not None and column in ("sparsity", "perplexity") else ""


def _failed_name(cell: Mapping[str, Any]) -> str:
    sweep = "" if cell["sweep"] is None else f", {cell['sweep']['option']} = {cell['sweep']['value']}"
    return f"{cell['model']}, {cell['label']} at {cell['asked']:g}{sweep}"


def _protocol_lines(protocol: Mapping[str, Any]) -> str:
    lines = []
    for text in protocol.get("texts") or ():
        last = "" if text["windows"] is None else text["first"] + text["windows"] - 1
        lines.append(f"- text {text['name']}: {text['text']}, windows {text['first']}-{last}")
    for name in ("calibration", "text", "tasks", "heal", "speed"):
        section = protocol.get(name)
        if section is not None:
            said = {key: value for key, value in section.items() if value is not None and not isinstance(value, dict)}
            said = {key: _shortened(key, value) for key, value in said.items()}
            lines.append(f"- {name}: " + ", ".join(f"{key} {value}" for key, value in said.items()))
    lines.append(f"- machine: {protocol['machine'] or 'unknown'}")
    return "\n".join(lines)


def _shortened(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)[:12] if key in ("fingerprint", "data") else value


def _sweep_tables(document: Mapping[str, Any]) -> list[str]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell in document["cells"]:
        if cell["sweep"] is not None and not cell.get("error"):
            groups.setdefault((cell["sweep"]["option"], cell["model"], cell["label"], cell["asked"]), []).append(cell)
    tables = []
    for (option, model, label, asked), cells in groups.items():
        body = [
            [str(cell["sweep"]["value"]), _text("sparsity", cell["sparsity"]), _text("perplexity", cell["perplexity"])]
            for cell in cells
        ]
        title = f"## {option}: {model}, {label} at {asked:g}"
        tables.append(title + "\n\n" + _table([option, "sparsity", "perplexity"], body, 0))
    return tables


def _table(columns: Sequence[str], body: Sequence[Sequence[str]], left: int) -> str:
    marks = [" --- " if index < left else " ---: " for index in range(len(columns))]
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(marks)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in body)])
