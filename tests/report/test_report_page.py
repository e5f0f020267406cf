from __future__ import annotations

import copy
import itertools
import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import Any

import pytest

from intraslice.errors import RecipeError
from intraslice.report import render_report
from intraslice.report.document import pareto_front
from support.sample_comparison import METHODS, SPARSITIES, sample

VOID = {"meta", "br", "input", "link", "img", "hr", "line", "rect", "circle", "path"}
SECTIONS = (
    "summary",
    "results",
    "tasks",
    "size",
    "speed",
    "layers",
    "errors",
    "rank",
    "spectra",
    "rope",
    "sweeps",
    "cost",
)


class Page(HTMLParser):
    """Elements with their attributes, text by element, and the data; fails where an element is not closed."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append((self.stack[-1] if self.stack else "", data))

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.elements if attrs.get("id")]

    def charts(self, **wanted: str) -> int:
        fields = {f"data-{name}": value for name, value in wanted.items()}
        return sum(tag == "figure" and fields.items() <= attrs.items() for tag, attrs in self.elements)

    def visible(self) -> str:
        return " ".join(text for tag, text in self.text if tag not in ("script", "style"))


def data(text: str, name: str = "comparison") -> Any:
    found = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', text)
    assert len(found) == 1
    return json.loads(found[0])


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return sample()


@pytest.fixture(scope="module")
def text(document) -> str:
    return render_report(document)


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_every_section_and_figure_is_there(page):
    assert [name for name in page.ids() if name.endswith("-0")] == [f"{name}-0" for name in SECTIONS]
    assert "protocol" in page.ids()
    assert page.charts(chart="sparsity", field="perplexity") == page.charts(chart="speed", field="average") == 1
    assert page.charts(chart="kept") == 6
    assert page.charts(chart="error") == 2
    assert page.charts(chart="spectrum") == 3
    assert page.charts(chart="sweep", option="allocation.ffn_share") == 2
    assert page.charts(chart="time") == page.charts(chart="memory") == page.charts(chart="rope") == 1


@pytest.mark.parametrize(
    ("parts", "gone"),
    [
        ({"tasks": False}, {"tasks"}),
        ({"speed": False}, {"speed"}),
        ({"ranks": False}, {"rank"}),
        ({"sweeps": False}, {"sweeps"}),
        ({"analysis": False}, {"spectra", "rope"}),
    ],
)
def test_a_section_is_there_only_with_its_data(parts, gone):
    page = Page(render_report(sample(methods=("intraslice", "flap"), layers=3, **parts)))
    assert {name.removesuffix("-0") for name in page.ids() if name.endswith("-0")} == set(SECTIONS) - gone
    # Accuracy against size and speed, and in two sweeps.
    lost = {"tasks": 4, "speed": 1, "sweeps": 2}
    assert page.charts(field="average") == 4 - sum(lost.get(name, 0) for name in gone)


def test_parts_of_layers_and_costs_that_are_missing(document):
    bare = copy.deepcopy(document)
    for cell in bare["cells"]:
        cell["prune"] = cell["layers"] = None
    bare["analysis"]["smollm2-135m"]["rope_pairs"] = None
    ids = set(Page(render_report(bare)).ids())
    assert not ids & {"layers-0", "errors-0", "cost-0", "rope-0"}
    assert "spectra-0" in ids
    for cell in document["cells"]:
        assert cell["layers"]  # the input was not changed
    errorless = copy.deepcopy(document)
    for layer in itertools.chain.from_iterable(cell["layers"] for cell in errorless["cells"]):
        layer["errors"].pop("attention", None)
    page = Page(render_report(errorless))
    assert page.charts(chart="error", site="attention") == 0
    assert page.charts(chart="error", site="ffn") == 1


def test_every_site_with_an_error_has_a_figure(document):
    experts = copy.deepcopy(document)
    for layer in itertools.chain.from_iterable(cell["layers"] for cell in experts["cells"] if cell["asked"]):
        layer["errors"] = {"attention": 0.1, "ffn.0": 0.2, "ffn.1": 0.3}
    text = render_report(experts)
    page = Page(text)
    assert page.charts(chart="error") == 3 and page.charts(chart="error", site="ffn.1") == 1
    assert data(text)["cells"][1]["layers"][0]["errors"]["ffn.1"] == 0.3


def test_the_two_errors_of_earlier_versions_are_read(document, text):
    old = copy.deepcopy(document)
    for layer in itertools.chain.from_iterable(cell["layers"] for cell in old["cells"]):
        errors = layer.pop("errors")
        layer["attention_error"], layer["ffn_error"] = errors.get("attention"), errors.get("ffn")
    assert render_report(old) == text


def test_nothing_comes_from_the_network(text, page):
    for tag, attrs in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        for name, value in attrs.items():
            if name in ("src", "href", "action", "data", "srcset", "xlink:href"):
                assert name == "href" and value and value.startswith("#"), f"{tag} {name}={value}"
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bimport\(|fetch\(|XMLHttpRequest|new Worker", text)
    policy = next(attrs["content"] for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs)
    assert policy and policy.startswith("default-src 'none'") and "unsafe-eval" not in policy


def test_anchors_lead_somewhere(page):
    targets = [attrs["href"] for tag, attrs in page.elements if tag == "a" and attrs.get("href")]
    assert targets and {target[1:] for target in targets} <= set(page.ids())
    assert len(page.ids()) == len(set(page.ids()))


def test_two_large_models_stay_small():
    large = sample(("one", "two"), layers=80)
    assert len(render_report(large).encode()) < 3_000_000
    assert len(render_report(sample(("one", "two"))).encode()) < 1_500_000


def test_the_same_document_gives_the_same_page(document, text):
    assert render_report(copy.deepcopy(document)) == text


def test_models_are_apart_and_can_be_chosen():
    text = render_report(sample(("one", "two"), methods=("intraslice",), layers=2))
    page = Page(text)
    assert [attrs.get("data-model") for tag, attrs in page.elements if tag == "article"] == ["0", "1"]
    assert "model" in page.ids() and {"results-0", "results-1"} <= set(page.ids())
    assert data(text, "view")["models"] == ["one", "two"]


def test_the_table_has_every_cell_with_its_numbers(document, page):
    visible = page.visible().replace("\u00a0", " ")
    rows = [attrs for tag, attrs in page.elements if tag == "tr" and "data-asked" in attrs]
    # All results and accuracy by task: dense, and each method at each sparsity.
    assert len(rows) == 2 * (1 + len(METHODS) * len(SPARSITIES))
    for cell in document["cells"]:
        if not cell["sweep"]:
            assert f"{cell['perplexity']:.2f}" in visible or f"{cell['perplexity']:.1f}" in visible
            assert f"{100 * cell['average']:.1f} %" in visible
    assert "348" not in visible.split("Pruning")[0]
    assert "5 min 40 s" in visible  # 0.97 * 348 + 0.9 + 1.2 seconds


def test_the_data_can_be_taken_out(document, text):
    found = data(text)
    assert [cell["key"] for cell in found["cells"]] == [cell["key"] for cell in document["cells"]]
    for cell, given in zip(found["cells"], document["cells"], strict=True):
        assert cell["perplexity"] == pytest.approx(given["perplexity"], rel=1e-5)
        assert cell["parameters"] == given["parameters"]


def marked(text: str) -> set[str]:
    return set(re.findall(r'<td class="best" data-sort="([^"]+)"', text))


def test_the_best_of_each_sparsity_is_marked(document, text):
    for value in SPARSITIES:
        group = [c for c in document["cells"] if c["asked"] == value and not c["sweep"]]
        assert str(min(c["perplexity"] for c in group)) in marked(text)
        assert str(sorted(c["perplexity"] for c in group)[1]) not in marked(text)
    dense = next(c for c in document["cells"] if c["method"] == "dense")
    assert str(dense["perplexity"]) not in marked(text)
    # All methods of a sparsity have the same KV cache here.
    assert not marked(text) & {str(c["speed"]["kv_cache_bytes_per_token"]) for c in document["cells"]}


def with_perplexities(values: dict[str, float | None]) -> str:
    document = sample(methods=tuple(values), sparsities=(0.3,), layers=1, tasks=False, speed=False, sweeps=False)
    for cell in document["cells"]:
        if cell["method"] != "dense":
            cell["perplexity"] = values[cell["method"]]
    return Page(render_report(document)).visible().replace("\u00a0", " ")


def test_the_headline_says_so_when_ours_is_best():
    visible = with_perplexities({"intraslice": 29.84, "flap": 52.6})
    assert re.search(r"Best perplexity:\s+intraslice\s+at 30 %", visible)
    assert "place" not in visible and "next: flap 52.60" in visible


def test_the_headline_says_so_when_ours_is_not_best():
    visible = with_perplexities({"intraslice": 29.84, "flap": 22.6, "sobp": 25.0})
    assert re.search(r"Best perplexity:\s+flap\s+at 30 %", visible)
    assert "intraslice has 29.84 at 30 % (place 3 of 3)" in visible


def test_the_headline_calls_a_tie_a_tie():
    assert "tied with sobp" in with_perplexities({"intraslice": 29.84, "sobp": 29.90, "flap": 52.6})


def test_what_was_not_measured_is_a_dash(document):
    odd = copy.deepcopy(document)
    cell = next(c for c in odd["cells"] if c["method"] == "flap")
    cell["perplexity"], cell["average"] = float("inf"), float("nan")
    text = render_report(odd)
    found = next(c for c in data(text)["cells"] if c["key"] == cell["key"])
    assert found["perplexity"] is None and found["average"] is None
    row = re.search(r'data-swatch="flap">flap</span></th><td data-sort="0.2">.*?</tr>', text)
    assert row and row[0].count("<td>\u2013</td>") == 2
    assert "nan" not in Page(text).visible() and "inf " not in Page(text).visible()


def test_a_failed_cell_shows_its_sentence(document):
    odd = copy.deepcopy(document)
    cell = next(c for c in odd["cells"] if c["label"] == "svd-llm" and c["asked"] == 0.5)
    for name in ("sparsity", "perplexity", "tasks", "average", "speed", "prune", "layers", "effective_rank"):
        cell[name] = None
    cell["error"] = "sparsity 0.5 leaves rank 0 in layer 3; lower --sparsity."
    visible = Page(render_report(odd)).visible().replace("\u00a0", " ")
    assert "Failed: sparsity 0.5 leaves rank 0 in layer 3; lower --sparsity." in visible
    assert "Without a result (the table says why): svd-llm at 50 %." in visible


def test_a_cell_far_from_its_budget_is_named(document):
    odd = copy.deepcopy(document)
    next(c for c in odd["cells"] if c["label"] == "slicegpt" and c["asked"] == 0.4)["sparsity"] = 0.37
    assert "slicegpt (37.0 % instead of 40 %)" in Page(render_report(odd)).visible().replace("\u00a0", " ")


NASTY = "</script><script>alert(1)</script><!-- \"'&<img src=x onerror=alert(1)>"


def test_text_of_the_document_stays_text():
    document = sample((NASTY,), methods=("intraslice",), sparsities=(0.3, 0.4), layers=1)
    clean = Page(render_report(sample(methods=("intraslice",), sparsities=(0.3,), layers=1)))
    document["title"] = document["protocol"]["machine"] = document["created"] = NASTY
    document["protocol"]["calibration"][NASTY] = NASTY
    for cell in document["cells"]:
        cell["label"] = NASTY + cell["label"]
        cell["options"][NASTY] = NASTY
        cell["tasks"] = {NASTY + name: score for name, score in cell["tasks"].items()}
    # One cell of the table, one of a sweep.
    document["cells"][2].update(error=NASTY)
    document["cells"][-2].update(error=NASTY)
    document["cells"][-1]["sweep"].update(option=NASTY, value=NASTY)
    text = render_report(document)
    page = Page(text)
    count = {tag: sum(name == tag for name, _ in page.elements) for tag in ("script", "img")}
    assert count == {"script": 3, "img": 0} == {tag: sum(n == tag for n, _ in clean.elements) for tag in count}
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert data(text)["title"] == NASTY
    assert NASTY in page.visible()


def front_by_brute_force(points: list[tuple[float, float]]) -> set[int]:
    def beats(a, b):
        return a[0] >= b[0] and a[1] <= b[1] and a != b

    return {i for i, p in enumerate(points) if not any(beats(q, p) for q in points)}


@pytest.mark.parametrize("seed", range(40))
def test_the_pareto_front_is_that_of_brute_force(seed):
    draw = random.Random(seed)
    # Few distinct values, so that ties and equal points occur.
    points = [(draw.randint(0, 6), draw.randint(0, 6)) for _ in range(draw.randint(0, 25))]
    front = pareto_front(points)
    assert set(front) == front_by_brute_force(points) and len(front) == len(set(front))
    assert [points[i][0] for i in front] == sorted((points[i][0] for i in front), reverse=True)


@pytest.mark.parametrize(("metric", "sign"), [("perplexity", 1), ("average", -1)])
def test_the_page_marks_the_front_of_speed_and_quality(document, text, metric, sign):
    cells = [c for c in document["cells"] if not c["sweep"]]
    points = [(c["speed"]["decode_speedup"], sign * c[metric]) for c in cells]
    wanted = {cells[i]["key"] for i in front_by_brute_force(points)}
    assert set(data(text, "view")["fronts"]["smollm2-135m"][metric]) == wanted
    assert 1 < len(wanted) < len(cells)


def test_tables_and_controls_can_be_used_without_a_mouse(page):
    heads = [attrs for tag, attrs in page.elements if tag == "th"]
    assert heads and all(attrs.get("scope") in ("col", "row") for attrs in heads)
    labelled = [attrs for tag, attrs in page.elements if tag == "div" and attrs.get("class") == "scroll"]
    assert labelled and all(attrs.get("tabindex") == "0" and attrs.get("aria-label") for attrs in labelled)
    assert sum(tag == "caption" for tag, _ in page.elements) == sum(tag == "table" for tag, _ in page.elements)
    chips = [attrs for tag, attrs in page.elements if tag == "button" and attrs.get("class") == "chip"]
    assert [attrs["data-label"] for attrs in chips] == list(METHODS) and all("aria-pressed" in a for a in chips)


def test_an_empty_comparison_is_a_page():
    empty = {"format": 1, "title": "nothing yet", "created": "2026-11-22", "protocol": {}, "cells": [], "analysis": {}}
    assert "no cells yet" in Page(render_report(empty)).visible()


def test_only_dense_has_no_empty_charts():
    page = Page(render_report(sample(methods=(), layers=2, sweeps=False, analysis=False)))
    assert {name for name in page.ids() if name.endswith("-0")} == {"summary-0", "results-0", "tasks-0"}


def test_analysis_alone_is_a_page():
    document = sample(methods=(), layers=2, sweeps=False)
    document["cells"] = []
    page = Page(render_report(document))
    assert {name for name in page.ids() if name.endswith("-0")} == {"spectra-0", "rope-0"}


def test_another_format_is_refused():
    with pytest.raises(RecipeError, match="format 2; this version reads format 1"):
        render_report({"format": 2, "title": "", "cells": []})


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_draws_every_figure(text, page, tmp_path):
    assert BROWSER
    file = tmp_path / "report.html"
    file.write_text(text, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run([BROWSER, *flags], capture_output=True, text=True, timeout=600, check=True)
    assert "CONSOLE" not in done.stderr
    drawn = done.stdout.split('id="protocol"')[0]
    assert drawn.count('class="focus-ring"') == sum(tag == "figure" for tag, _ in page.elements)
    assert "NaN" not in drawn and "undefined" not in drawn


def test_gap_and_divergence_text_by_text(document):
    changed = copy.deepcopy(document)
    for cell in changed["cells"]:
        cell["texts"] = {"wiki": cell["perplexity"], "q.a": 2 * cell["perplexity"]}
        if cell["method"] != "dense":
            cell["gaps"], cell["mean_gap"] = {"wiki": 0.4371, "q.a": 0.6413}, 0.5392
            cell["divergence"], cell["mean_kl"] = {"q.a": {"kl": 0.1234, "agreement": 0.7654}}, 0.1234
            cell["paired"] = {"tasks": {}, "average": {"difference": -0.0345, "stderr": 0.0067}}
    page = Page(render_report(changed))
    assert "texts-0" in page.ids()
    shown = page.visible()
    for text in ("Perplexity by text", "q.a", "0.641", "0.539", "0.123", "76.5", "-3.45", "0.67", "paired"):
        assert text in shown, text
    assert "Perplexity by text" not in Page(render_report(document)).visible()
