"""The sections of one model; a section without data is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from intraslice.report.document import DENSE, SPEED, Cell, by_sparsity, finite, get
from intraslice.report.summary import Summary, summarize
from intraslice.report.tables import Choice, Table, main_table, task_table, text_table
from intraslice.report.words import asked, key
from intraslice.results.sites import list_sites, site_title

KEPT = (
    ("num_attention_heads", "Query heads"),
    ("num_key_value_heads", "Key/value heads"),
    ("qk_head_dim", "Head dimension of query and key"),
    ("v_head_dim", "Head dimension of value"),
    ("intermediate_size", "FFN channels"),
    ("num_parameters", "Parameters"),
)
QUALITY = (("perplexity", "Perplexity"), ("average", "Average accuracy"))
SPECTRA = (
    ("context", "Context: input of the output projection, mean over heads"),
    ("act", "Act: input of the down projection"),
    ("residual", "Residual stream: output of the layer"),
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure, which a script draws from the data of the page.

    Attributes:
        caption: above the figure.
        data: which chart it is, and what the chart shows.
        kind: CSS class.
    """

    caption: str
    data: dict[str, str]
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What `figures.html` shows.

    Attributes:
        figures: side by side.
        choice: the choice of the sparsity that they show.
        failures: sentences about cells that are not in them.
    """

    template = "figures.html"
    figures: Sequence[Figure]
    choice: Choice | None = None
    failures: Sequence[str] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section.

    Attributes:
        id: of its element.
        title: its head.
        note: how it is to be read.
        body: what it shows; its `template` shows it.
    """

    id: str
    title: str
    note: str
    body: Summary | Table | Figures


@dataclass(frozen=True, kw_only=True)
class Article:
    """Everything about one model: its number on the page, its name, and the sections that have data."""

    index: int
    model: str
    sections: Sequence[Section]


def build_article(index: int, model: str, comparison: dict[str, Any]) -> Article:
    """Return everything about one model."""
    cells = [cell for cell in comparison["cells"] if cell["model"] == model]
    main = [cell for cell in cells if not cell.get("sweep")]
    done = [cell for cell in main if not cell.get("error")]
    analysis = (comparison.get("analysis") or {}).get(model) or {}
    found = [
        ("summary", "Summary", "", summarize(main) if main else None),
        ("results", "All results", TABLE_NOTE, _results(index, main)),
        ("texts", "Perplexity by text", TEXT_NOTE, text_table(done, f"Perplexity by text, {model}")),
        ("tasks", "Accuracy by task", TASK_NOTE, task_table(done, f"Accuracy by task, {model}")),
        ("size", "Quality against size", SIZE_NOTE, _quality(done, "sparsity", "against sparsity", "sparsity")),
        ("speed", "Quality against decode speed", SPEED_NOTE, _quality(done, "speed", "against decode speed", SPEED)),
        ("layers", "What is kept in each layer", KEPT_NOTE, _kept(index, done)),
        ("errors", "Error of each site", ERROR_NOTE, _errors(index, done)),
        ("rank", "Effective rank of the layer outputs", RANK_NOTE, _rank(index, done)),
        ("spectra", "Spectra of the dense model", SPECTRA_NOTE, _spectra(analysis)),
        ("rope", "Sensitivity to rotary pairs", ROPE_NOTE, _rope(analysis)),
        ("sweeps", "Sweeps", SWEEP_NOTE, _sweeps(cells)),
        ("healing", "Healing", HEALING_NOTE, _healing(done)),
        ("cost", "Cost of pruning", COST_NOTE, _cost(index, done)),
    ]
    sections = [
        Section(id=f"{name}-{index}", title=title, note=note, body=body) for name, title, note, body in found if body
    ]
    return Article(index=index, model=model, sections=sections)


TABLE_NOTE = (
    "Select a column head to sort. The best of each sparsity is marked. Sparsity is the removed share of the decoder "
    "layers' linear weights, counted on the stored tensors."
)
TEXT_NOTE = (
    "Log gap: ln(perplexity / dense perplexity); 0.1 is 10.5 % more. KL: mean divergence from the dense model's "
    "predictions. Same token: how often both find the same token most likely. The mean takes each text once."
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
    "Relative squared error on the calibration tokens, as recorded: of what attention or the FFN should add to the "
    "residual stream. For intraslice, iter-pca, ada-h and naive that includes what earlier layers left to repair; for "
    "slicegpt it is the share of the stream behind it that is deleted. So compare layers rather than methods."
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
    "lambda_b (allocation.ffn_share)."
)
HEALING_NOTE = (
    "KL divergence from the dense model on held-out text while the pruned model is trained to agree with it, in nats "
    "per token; the weights of the lowest point are kept."
)
COST_NOTE = (
    "Time and peak memory of the pruning run. A gradient pass that several runs share is counted in each of them."
)


def _figure(chart: str, caption: str, kind: str = "", **data: str) -> Figure:
    return Figure(caption=caption, data={"chart": chart, **data}, kind=kind)


def _grid(figures: Sequence[Figure]) -> Figures | None:
    return Figures(figures=figures) if figures else None


def _buttons(values: Sequence[float]) -> list[tuple[str, str]]:
    return [(key(value), asked(value)) for value in values]


def _results(index: int, cells: Sequence[Cell]) -> Table | None:
    if not cells:
        return None
    values = sorted({cell["asked"] for cell in cells if cell["method"] != DENSE})
    choice = Choice(name=f"rows-{index}", options=[("", "All"), *_buttons(values)], chosen="")
    return main_table(cells, f"All results, {cells[0]['model']}", choice if len(values) > 1 else None)


def _quality(cells: Sequence[Cell], chart: str, against: str, other: str) -> Figures | None:
    pruned = [cell for cell in cells if cell["method"] != DENSE and get(cell, other) is not None]
    return _grid(
        [
            _figure(chart, f"{title} {against}", field=field)
            for field, title in QUALITY
            if any(get(cell, field) is not None for cell in pruned)
        ]
    )


def _with_choice(index: int, name: str, cells: Sequence[Cell], figures: Sequence[Figure]) -> Figures | None:
    if not figures:
        return None
    values = list(by_sparsity(cells))
    # The middle one: at the smallest sparsity methods hardly differ, at the largest many have broken down.
    middle = values[(len(values) - 1) // 2]
    return Figures(figures=figures, choice=Choice(name=f"{name}-{index}", options=_buttons(values), chosen=key(middle)))


def _layers_of(cells: Sequence[Cell]) -> list[Cell]:
    return [layer for cell in cells if cell["method"] != DENSE for layer in cell.get("layers") or []]


def _kept(index: int, cells: Sequence[Cell]) -> Figures | None:
    layers = _layers_of(cells)
    figures = [
        _figure("kept", title, field=name)
        for name, title in KEPT
        if any(get(layer, name) is not None for layer in layers)
    ]
    return _with_choice(index, "layers", cells, figures)


def _errors(index: int, cells: Sequence[Cell]) -> Figures | None:
    figures = [_figure("error", site_title(site), site=site) for site in list_sites(_layers_of(cells))]
    return _with_choice(index, "errors", cells, figures)


def _rank(index: int, cells: Sequence[Cell]) -> Figures | None:
    known = any(cell.get("effective_rank") for cell in cells if cell["method"] != DENSE)
    return _with_choice(index, "rank", cells, [_figure("rank", "Effective rank", "full")] if known else [])


def _spectra(analysis: dict[str, Any]) -> Figures | None:
    figures = [_figure("spectrum", title, field=name) for name, title in SPECTRA if analysis.get(f"{name}_spectrum")]
    if any((analysis.get("effective_rank") or {}).values()):
        figures.append(_figure("sites", "Effective rank, site by site"))
    return _grid(figures)


def _rope(analysis: dict[str, Any]) -> Figures | None:
    known = (analysis.get("rope_pairs") or {}).get("relative_error")
    return _grid([_figure("rope", "Error of the attention output, layer by layer", "full")]) if known else None


def _sweeps(cells: Sequence[Cell]) -> Figures | None:
    sweeps = [cell for cell in cells if cell.get("sweep")]
    done = [cell for cell in sweeps if not cell.get("error")]
    options = list(dict.fromkeys(cell["sweep"]["option"] for cell in done))
    figures = [
        _figure("sweep", f"{title} against {option}", field=field, option=option)
        for option in options
        for field, title in QUALITY
        if any(get(c, field) is not None for c in done if c["sweep"]["option"] == option)
    ]
    failures = [
        f"{cell['label']}, {cell['sweep']['option']} = {cell['sweep']['value']}: {cell['error']}"
        for cell in sweeps
        if cell.get("error")
    ]
    return Figures(figures=figures, failures=failures) if figures or failures else None


def _healing(cells: Sequence[Cell]) -> Figures | None:
    known = any(cell.get("healing") for cell in cells)
    return _grid([_figure("healing", "Held-out KL divergence against tokens trained on", "full")] if known else [])


def _cost(index: int, cells: Sequence[Cell]) -> Figures | None:
    prunes = [cell.get("prune") or {} for cell in cells]
    figures = []
    if any(finite(value) is not None for prune in prunes for value in (prune.get("seconds") or {}).values()):
        figures.append(_figure("time", "Time"))
    if any(get(prune, "peak_memory_bytes") is not None for prune in prunes):
        figures.append(_figure("memory", "Peak memory"))
    return _with_choice(index, "cost", cells, figures)
