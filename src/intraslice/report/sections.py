"""The sections of one model; a section without data is not there."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from intraslice.report.figures import DENSE, SPEED, Cell, asked, finite, get, key
from intraslice.report.tables import main_table, task_table
from intraslice.report.words import by_sparsity, headline

KEPT = (
    ("num_attention_heads", "Query heads"),
    ("num_key_value_heads", "Key/value heads"),
    ("qk_head_dim", "Head dimension of query and key"),
    ("v_head_dim", "Head dimension of value"),
    ("intermediate_size", "FFN channels"),
    ("num_parameters", "Parameters"),
)
ERRORS = (("attention_error", "Attention"), ("ffn_error", "FFN"))
QUALITY = (("perplexity", "Perplexity"), ("average", "Average accuracy"))
SPECTRA = (
    ("context", "Context: input of the output projection, mean over heads"),
    ("act", "Act: input of the down projection"),
    ("residual", "Residual stream: output of the layer"),
)


def article(index: int, model: str, comparison: dict[str, Any], *, alone: bool) -> str:
    """Return everything about one model."""
    cells = [cell for cell in comparison["cells"] if cell["model"] == model]
    main = [cell for cell in cells if not cell.get("sweep")]
    done = [cell for cell in main if not cell.get("error")]
    analysis = (comparison.get("analysis") or {}).get(model) or {}
    found = [
        ("summary", "Summary", "", headline(main) if main else ""),
        ("results", "All results", TABLE_NOTE, _results(index, main)),
        ("tasks", "Accuracy by task", TASK_NOTE, task_table(done, f"Accuracy by task, {model}")),
        ("size", "Quality against size", SIZE_NOTE, _quality(done, "sparsity", "against sparsity", "sparsity")),
        ("speed", "Quality against decode speed", SPEED_NOTE, _quality(done, "speed", "against decode speed", SPEED)),
        ("layers", "What is kept in each layer", KEPT_NOTE, _per_layer(index, "layers", done, "kept", KEPT)),
        ("errors", "Error of each block", ERROR_NOTE, _per_layer(index, "errors", done, "error", ERRORS)),
        ("rank", "Effective rank of the layer outputs", RANK_NOTE, _rank(index, done)),
        ("spectra", "Spectra of the dense model", SPECTRA_NOTE, _spectra(analysis)),
        ("rope", "Sensitivity to rotary pairs", ROPE_NOTE, _rope(analysis)),
        ("sweeps", "Sweeps", SWEEP_NOTE, _sweeps(cells)),
        ("cost", "Cost of pruning", COST_NOTE, _cost(index, done)),
    ]
    found = [(f"{name}-{index}", title, note, body) for name, title, note, body in found if body]
    links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _, _ in found)
    heading = "" if alone else f'<h2 class="model">{escape(model)}</h2>'
    sections = "".join(
        f'<section id="{name}"><h2>{title}</h2>{f"<p>{note}</p>" if note else ""}{body}</section>'
        for name, title, note, body in found
    )
    return f'<article data-model="{index}">{heading}<ul class="contents">{links}</ul>{sections}</article>'


TABLE_NOTE = (
    "Select a column head to sort. The best of each sparsity is marked. Sparsity is the removed share of the decoder "
    "layers' linear weights, counted on the stored tensors."
)
TASK_NOTE = "Zero-shot, with standard errors; the metric of each task is below its name."
SIZE_NOTE = "Sparsity as counted on the stored tensors. The dashed line is the dense model."
SPEED_NOTE = (
    "Decode speed as measured on the saved models, each in turns with the dense one. Models on the Pareto front, which "
    "no other beats in both, are ringed and joined by the wide band."
)
KEPT_NOTE = (
    "Share of the dense layer that is left: the fuller the colour, the more is left. Point at a cell for the number."
)
ERROR_NOTE = (
    "Relative squared error on the calibration tokens, as recorded: of what the block should add to the residual "
    "stream. For intraslice, iter-pca, ada-h and naive that includes what earlier layers left to repair; for slicegpt "
    "it is the share of the stream behind the block that is deleted. So compare layers rather than methods."
)
RANK_NOTE = (
    "How many of the largest eigenvalues of the second moment hold 99 % of their sum, at the output of each decoder "
    "layer. Pruning that leaves the residual stream alone stays near the dense line."
)
SPECTRA_NOTE = (
    "Share of each direction in the second moment of the activations, largest first. Where the bright part is "
    "narrow, few directions carry the layer."
)
ROPE_NOTE = "Relative error of the attention output when only this share of the rotary pairs of each head is kept."

SWEEP_NOTE = (
    "One option changed at a time, all else as in the table. The paper shows the size of the calibration data and "
    "lambda_b (allocation.ffn_bias)."
)
COST_NOTE = (
    "Time and peak memory of the pruning run. A gradient pass that several runs share is counted in each of them."
)


def _figure(chart: str, caption: str, kind: str = "", **data: str) -> str:
    fields = "".join(f' data-{name}="{escape(value)}"' for name, value in {"chart": chart, **data}.items())
    return (
        f'<figure class="{kind}"{fields}><figcaption>{escape(caption)}</figcaption><div class="plot"></div>'
        '<details class="numbers"><summary>Show as table</summary></details></figure>'
    )


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _selector(name: str, values: Sequence[float], chosen: str, first: str = "") -> str:
    """Radio buttons for a sparsity; `first` names a button for all of them."""
    options = [("", first)] if first else []
    options += [(key(value), asked(value)) for value in values]
    buttons = "".join(
        f'<label><input type="radio" name="{name}" value="{value}"{" checked" if value == chosen else ""}>'
        f"<span>{text}</span></label>"
        for value, text in options
    )
    return f'<fieldset class="choice"><legend>Sparsity</legend>{buttons}</fieldset>'


def _results(index: int, cells: Sequence[Cell]) -> str:
    if not cells:
        return ""
    values = sorted({cell["asked"] for cell in cells if cell["method"] != DENSE})
    selector = _selector(f"rows-{index}", values, "", first="All") if len(values) > 1 else ""
    table = main_table(cells, f"All results, {cells[0]['model']}")
    return f'<div class="filter">{selector}</div>{table}'


def _quality(cells: Sequence[Cell], chart: str, against: str, other: str) -> str:
    pruned = [cell for cell in cells if cell["method"] != DENSE and get(cell, other) is not None]
    return _grid(
        [
            _figure(chart, f"{title} {against}", field=field)
            for field, title in QUALITY
            if any(get(cell, field) is not None for cell in pruned)
        ]
    )


def _with_selector(index: int, name: str, cells: Sequence[Cell], figures: Sequence[str]) -> str:
    if not figures:
        return ""
    values = list(by_sparsity(cells))
    # The middle one: at the smallest sparsity methods hardly differ, at the largest many have broken down.
    middle = values[(len(values) - 1) // 2]
    return f'<div class="chosen">{_selector(f"{name}-{index}", values, key(middle))}</div>{_grid(figures)}'


def _per_layer(index: int, name: str, cells: Sequence[Cell], chart: str, fields: Sequence[tuple[str, str]]) -> str:
    pruned = [cell for cell in cells if cell["method"] != DENSE]
    layers = [layer for cell in pruned for layer in cell.get("layers") or []]
    figures = [
        _figure(chart, title, field=f) for f, title in fields if any(get(layer, f) is not None for layer in layers)
    ]
    return _with_selector(index, name, cells, figures)


def _rank(index: int, cells: Sequence[Cell]) -> str:
    known = any(cell.get("effective_rank") for cell in cells if cell["method"] != DENSE)
    return _with_selector(index, "rank", cells, [_figure("rank", "Effective rank", "full")] if known else [])


def _spectra(analysis: dict[str, Any]) -> str:
    figures = [_figure("spectrum", title, field=name) for name, title in SPECTRA if analysis.get(f"{name}_spectrum")]
    if any((analysis.get("effective_rank") or {}).values()):
        figures.append(_figure("sites", "Effective rank, site by site"))
    return _grid(figures)


def _rope(analysis: dict[str, Any]) -> str:
    known = (analysis.get("rope_pairs") or {}).get("relative_error")
    return _grid([_figure("rope", "Error of the attention output, layer by layer", "full")]) if known else ""


def _sweeps(cells: Sequence[Cell]) -> str:
    sweeps = [cell for cell in cells if cell.get("sweep")]
    done = [cell for cell in sweeps if not cell.get("error")]
    options = list(dict.fromkeys(cell["sweep"]["option"] for cell in done))
    figures = [
        _figure("sweep", f"{title} against {option}", field=field, option=option)
        for option in options
        for field, title in QUALITY
        if any(get(c, field) is not None for c in done if c["sweep"]["option"] == option)
    ]
    failed = "".join(
        f"<li>{escape(cell['label'])}, {escape(str(cell['sweep']['option']))} = {escape(str(cell['sweep']['value']))}: "
        f"{escape(str(cell['error']))}</li>"
        for cell in sweeps
        if cell.get("error")
    )
    return _grid(figures) + (f'<ul class="failed">{failed}</ul>' if failed else "")


def _cost(index: int, cells: Sequence[Cell]) -> str:
    prunes = [cell.get("prune") or {} for cell in cells]
    figures = []
    if any(finite(value) is not None for prune in prunes for value in (prune.get("seconds") or {}).values()):
        figures.append(_figure("time", "Time"))
    if any(get(prune, "peak_memory_bytes") is not None for prune in prunes):
        figures.append(_figure("memory", "Peak memory"))
    return _with_selector(index, "cost", cells, figures)
