"""Write docs/families.md from the table of families and the outcomes of their tests.

    python scripts/families.py                # runs the tests of all families, keeps the outcomes, writes the page
    python scripts/families.py --only X Y     # runs those of some families, keeps the other outcomes
    python scripts/families.py --columns ONNX # runs those of some columns, keeps the other outcomes
    python scripts/families.py --write        # writes the page again from the outcomes that were kept

What the page says of a family was passed by a test, is refused for a reason that the table of families gives, or is
marked as not tested. The outcomes lie in docs/families.json; tests/test_families_page.py fails when they, the page and
the table of families do not belong together.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from intraslice.checkpoint.gguf import ARCHITECTURES
from intraslice.runtime.families_intraslice import FAMILIES, FamilySpec

ROOT = Path(__file__).resolve().parents[1]
OUTCOMES = ROOT / "docs" / "families.json"
PAGE = ROOT / "docs" / "families.md"


@dataclass(frozen=True)
class Check:
    """A column of the page.

    Attributes:
        title: of the column.
        test: the test that decides, FILE::FUNCTION; its parameter is the family, with words behind it where the family
            is tested in several forms.
        means: what it says, for the list below the table.
    """

    title: str
    test: str
    means: str


_FAMILIES_FILE = "tests/runtime/test_families.py"
CHECKS = (
    Check(
        "dense shape",
        f"{_FAMILIES_FILE}::test_dense_shape_equals_the_stock_class",
        "our attention at the dense shape gives the logits of the stock class to 1e-10, in float64",
    ),
    Check(
        "layer",
        f"{_FAMILIES_FILE}::test_a_layer_taken_apart_equals_the_stock_layer",
        "a layer that the engine runs in pieces equals the stock layer to 1e-10, in float64",
    ),
    Check(
        "twin",
        f"{_FAMILIES_FILE}::test_zero_padding_gives_the_stock_class",
        "a pruned model, filled up with zeros, is a stock model with the same logits to 1e-10, in float64; with norms "
        "of query and key, at their dense width. Where such a norm goes over all heads, its weight takes a factor that "
        "float32 rounds, which alone changes logits by up to 1e-6: there the twin is made of a checkpoint in float64",
    ),
    Check(
        "sparsity 0",
        f"{_FAMILIES_FILE}::test_sparsity_zero_is_the_identity",
        "pruned at 0 the logits are the dense ones, in float32",
    ),
    Check(
        "30 %",
        f"{_FAMILIES_FILE}::test_a_pruned_model_reloads_to_what_was_streamed",
        "pruned at 30 %, saved and loaded, the logits are those that the engine saw",
    ),
    Check(
        "perplexity",
        f"{_FAMILIES_FILE}::test_perplexity_is_that_of_a_plain_loop",
        "`eval` gives the perplexity of a plain transformers loop to 1e-6",
    ),
    Check(
        "dropped blocks",
        "tests/runtime/test_dropped_blocks.py::test_every_family_can_lose_its_blocks",
        "layers without attention or FFN load, and compute what the dense model does with these blocks silenced",
    ),
    Check(
        "one shape",
        f"{_FAMILIES_FILE}::test_one_shape_for_all_layers_is_a_stock_model",
        "`--target stock` and `export --to stock` give a checkpoint of the stock class",
    ),
    Check(
        "vLLM",
        "tests/runtime/test_vllm_plugin.py::test_every_family_through_the_attention_of_vllm",
        "the attention interface of vLLM, computed by a stand-in, gives the logits of the checkpoint; deployment.md "
        "says which families ran in vLLM itself",
    ),
    Check(
        "llama.cpp",
        "tests/exporters/test_export_gguf.py::test_a_family_in_llama_cpp",
        "the GGUF file, run by an independent reading of llama.cpp's equations, gives the logits of the checkpoint",
    ),
    Check(
        "ONNX",
        "tests/exporters/test_onnx.py::test_other_families",
        "onnxruntime gives the logits of the checkpoint, with and without cache",
    ),
)


def refusal(spec: FamilySpec, title: str) -> str | None:
    """Return why a family cannot pass a check; None where it can."""
    if title == "llama.cpp" and spec.llama_cpp is not None:
        # Also where --target cannot: checkpoints of other shapes are zero-padded.
        return None
    target = {"llama.cpp": "llama.cpp", "one shape": "stock"}.get(title, "")
    return spec.without_targets.get(target)


def run_tests(only: Sequence[str], columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Run the tests of some families and columns; return the outcome of each, by family and title."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-k", " or ".join(only)] if only else []
        tests = [check.test for check in CHECKS if check.title in columns]
        subprocess.run([*command, *tests], cwd=ROOT, check=False)
        if not report.exists():
            sys.exit("error: the tests did not run; nothing was written")
        found = read_outcomes(report)
        # -k takes parts of names as well.
        return {name: found.get(name, {}) for name in only} if only else found


_WORSE = ("passed", "skipped", "failed")


def read_outcomes(report: Path) -> dict[str, dict[str, str]]:
    """Return the outcomes of a JUnit report: "passed", "failed" or "skipped", by family and title.

    A family that was tested in several forms has the worst outcome of them.
    """
    titles = {(Path(check.test.split("::")[0]).stem, check.test.split("::")[1]): check.title for check in CHECKS}
    found: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        function, _, parameter = case.attrib["name"].partition("[")
        title = titles.get((case.attrib["classname"].rpartition(".")[2], function))
        if title is None:
            continue
        bad = any(case.find(kind) is not None for kind in ("failure", "error"))
        outcome = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        row = found.setdefault(parameter.removesuffix("]").split()[0], {})
        row[title] = max(outcome, row.get(title, outcome), key=_WORSE.index)
    return found


def page(data: dict[str, object]) -> str:
    """Return the page for what `docs/families.json` holds."""
    outcomes = data["outcomes"]
    assert isinstance(outcomes, dict)
    titles = [check.title for check in CHECKS]
    lines = [
        "# Families",
        "",
        "The family of a model is the `model_type` in its `config.json`; of a vision-language model, that of its text",
        "tower. This page is written by `python scripts/families.py` from the table of families and from the outcomes",
        f"of tests on tiny models that switch on what is special about each family ({data['tested']}).",
        "",
        f"| family | {' | '.join(titles)} |",
        "| --- |" + " --- |" * len(titles),
    ]
    for name, spec in FAMILIES.items():
        cells = [_cell(outcomes.get(name, {}).get(title), refusal(spec, title)) for title in titles]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", "What the columns say (yes: the test passed; no: refused; –: no test):", ""]
    lines += [f"- **{check.title}**: {check.means}." for check in CHECKS]
    lines += [
        "",
        "No table can say how well a family can be pruned: quality was measured on real checkpoints of `llama` and",
        "`gemma3_text` only, see [benchmarks.md](benchmarks.md). vLLM is checked by `scripts/check_vllm.sh`, see",
        "[deployment.md](deployment.md).",
        "",
        "## What each family is, and what is refused",
        "",
        "| family | transformers | special | refused when set | in llama.cpp | text tower of | GGUF input |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, spec in FAMILIES.items():
        cells = [
            f"{spec.since}",
            ", ".join(features(spec)),
            ", ".join(f"`{field}`" for field in spec.refuse),
            in_llama_cpp(spec),
            ", ".join(f"`{composite}`" for composite in spec.text_of),
            "yes" if spec.gguf in ARCHITECTURES else "",
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += [
        "",
        "`slicegpt` takes the families "
        + ", ".join(f"`{name}`" for name, spec in FAMILIES.items() if spec.rotatable)
        + ".",
        'In llama.cpp `deci` has a shape per layer; where it lacks something ("no ..."), files have the family\'s own',
        "architecture, which has one shape for all layers. See [deployment.md](deployment.md#llamacpp).",
        "`intraslice inspect MODEL` says of a model that is not here what is missing for it.",
        "",
    ]
    return "\n".join(lines)


def in_llama_cpp(spec: FamilySpec) -> str:
    """Return the architecture of the files for llama.cpp, or what it has no place for."""
    if not spec.llama_cpp_lacks:
        return "`deci`: a shape per layer"
    if spec.llama_cpp is not None:
        return f"`{spec.llama_cpp.architecture}`: one shape" + (", dense heads" if spec.llama_cpp.fills_hidden else "")
    return f"no {', no '.join(spec.llama_cpp_lacks)}"


def features(spec: FamilySpec) -> list[str]:
    """Return in words what is special about a family."""
    found = {
        "norms of query and key": spec.qk_norm is not None and spec.qk_norm.over == "head",
        "norms of query and key over all heads": spec.qk_norm is not None and spec.qk_norm.over == "all",
        "norms of outputs": spec.output_norms,
        "no norms of inputs": spec.attention_norm is None,
        "parallel blocks": spec.parallel is True and not spec.variants,
        "parallel blocks as the config says": isinstance(spec.parallel, str),
        "factor on the residual sum": spec.residual_scale is not None,
        "temperature of the queries": spec.query_temperature,
        "no RoPE": spec.rope is False,
        "RoPE in some layers": isinstance(spec.rope, str),
        "interleaved RoPE": spec.interleaved,
        "blocks, norms and kv heads as the config says": bool(spec.variants),
        "matrices stored transposed": spec.transposed,
        "fused projections": bool(spec.q.parts) or bool(spec.up.parts),
        "no gate": spec.gate is None,
        "LayerNorm": spec.norm.startswith("layer"),
        "windows begin with BOS": spec.starts_with_bos,
    }
    return [words for words, has in found.items() if has]


def _cell(outcome: str | None, refused: str | None) -> str:
    if outcome == "failed":
        return "**FAILED**"
    if outcome == "passed":
        return "yes"
    return "no" if refused is not None else "–"


def main() -> None:
    """Run what was asked for; exit status 1 when a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="run no tests")
    titles = [check.title for check in CHECKS]
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=[], help="run the tests of these families")
    parser.add_argument("--columns", nargs="+", choices=titles, default=titles, help="run the tests of these columns")
    arguments = parser.parse_args()
    data: dict[str, Any] = {"outcomes": {}}
    if arguments.write or arguments.only or arguments.columns != titles:
        data = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    if not arguments.write:
        import torch
        import transformers

        versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
        tested = f"{date.today().isoformat()}, {versions}, Python {platform.python_version()}"
        outcomes = data["outcomes"]
        for name, row in run_tests(arguments.only, arguments.columns).items():
            kept = {title: found for title, found in outcomes.get(name, {}).items() if title not in arguments.columns}
            outcomes[name] = {**kept, **row}
        data = {"tested": tested, "outcomes": outcomes}
        OUTCOMES.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(data), encoding="utf-8")
    failed = [f"{name}: {title}" for name, row in data["outcomes"].items() for title in row if row[title] == "failed"]
    sys.exit("failed: " + "; ".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
