"""Existing results as one document: comparisons, and checkpoints that were pruned one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from intraslice.border import check_schema, read_json
from intraslice.comparison.cells import digest, short_names
from intraslice.comparison.document import pruned_fields
from intraslice.comparison.schema import Document, PruneRecord
from intraslice.comparison.tables import DOCUMENT_FILE
from intraslice.errors import CheckpointError, ComparisonError
from intraslice.methods.registry import METHODS
from intraslice.names import expanded
from intraslice.report.document import DENSE, FORMAT, HEALED
from intraslice.results.result import RESULT_FILE, PruneResult


@dataclass(frozen=True)
class _Result:
    """A document and what the user calls it."""

    name: str
    document: dict[str, Any]


def merge_results(paths: Sequence[str]) -> dict[str, Any]:
    """Return the results as one document; a cell that is in several of them is taken once.

    Args:
        paths: folders of comparisons, comparison.json files, folders of pruned checkpoints, or their result.json.

    Raises:
        CheckpointError: a path holds no result.
        ComparisonError: the results were not measured in the same way.
    """
    results = [_load(path) for path in paths]
    for index, second in enumerate(results):
        for first in results[:index]:
            _check_protocols(first, second)
    documents = [result.document for result in results]
    cells: dict[str, dict[str, Any]] = {}
    for document in documents:
        for cell in document["cells"]:
            # A failed one gives way to one that worked.
            if cell["key"] not in cells or cells[cell["key"]].get("error"):
                cells[cell["key"]] = cell
    titles = dict.fromkeys(document["title"] for document in documents)
    return {
        "format": FORMAT,
        "title": ", ".join(titles),
        "created": date.today().isoformat(),
        "protocol": _merged_protocol([document["protocol"] for document in documents]),
        "cells": _with_unique_labels(list(cells.values())),
        "analysis": {name: found for document in documents for name, found in document["analysis"].items()},
    }


def _load(path: str) -> _Result:
    given = expanded(path)
    candidates = [given / DOCUMENT_FILE, given / RESULT_FILE] if given.is_dir() else [given]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{path!r} holds no result; give a folder that `intraslice compare` or `intraslice prune` has written."
        )
    what = repr(str(file))
    content = read_json(file, what, CheckpointError)
    if content.get("format") == FORMAT and "cells" in content:
        check_schema(Document, content, what, CheckpointError)
        return _Result(path, content)
    if "requested_sparsity" in content:
        PruneResult.from_foreign(content, what)
        check_schema(PruneRecord, content, what, CheckpointError)
        return _Result(path, _document_of_prune(content))
    raise CheckpointError(f"{str(file)!r} is neither a comparison of format {FORMAT} nor the result of a prune.")


def _document_of_prune(result: dict[str, Any]) -> dict[str, Any]:
    """Return a document with one cell, of which only what the prune itself knows is measured."""
    name = short_names([result["model"]])[result["model"]]
    calibration, healing = result["calibration"], result.get("healing")
    made = [result["recipe"], calibration["fingerprint"], result["layers"]]
    cell = {
        "key": digest(made if healing is None else [*made, healing]),
        "model": name,
        "label": result["method"] + (HEALED if healing else ""),
        "method": result["method"],
        "options": _options(result["recipe"]),
        "sweep": None,
        "asked": result["requested_sparsity"],
        **pruned_fields(result),
        **dict.fromkeys(("perplexity", "tasks", "average", "speed", "effective_rank")),
    }
    return {
        "format": FORMAT,
        "title": f"{name}, {result['method']}",
        "protocol": {
            "calibration": {
                "source": Path(calibration["name"]).name,
                **{field: calibration[field] for field in ("num_samples", "seqlen", "seed")},
                "fingerprint": None,
                "tokens": {name: calibration["fingerprint"]},
            },
            "text": None,
            "tasks": None,
            "speed": None,
            "machine": "",
            "versions": result["versions"],
            "models": {},
        },
        "cells": [cell],
        "analysis": {},
    }


def _options(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe that its preset does not explain."""
    from intraslice.recipes.merge import flatten
    from intraslice.recipes.old_names import translate
    from intraslice.recipes.recipe import load_recipe
    from intraslice.recipes.words import SECTIONS

    if recipe.get("method") not in METHODS:
        return {}
    flags = {name: recipe[name] for name in ("model", "method", "sparsity")}
    plain = flatten(load_recipe(None, flags).method_options())
    given, _ = translate(flatten({name: value for name, value in recipe.items() if name in SECTIONS}))
    return {
        name: value
        for name, value in given.items()
        if name.partition(".")[0] not in ("calibration", "run") and plain.get(name) != value
    }


def _check_protocols(first: _Result, second: _Result) -> None:
    for field, one, other in _differences(first.document["protocol"], second.document["protocol"]):
        raise ComparisonError(
            f"the results {first.name!r} and {second.name!r} were not measured in the same way: {field} is {one!r} in "
            f"the first and {other!r} in the second; compare only what was measured in one way."
        )


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    # The readable fields come first: a fingerprint is named only where nothing else explains the difference.
    fields = {
        "calibration": ("num_samples", "seqlen", "seed"),
        "text": ("seqlen", "windows", "dtype", "fingerprint"),
        "tasks": ("names", "limit", "data"),
    }
    if first.get("texts") and second.get("texts") and first["texts"] != second["texts"]:
        yield "texts", first["texts"], second["texts"]
    for section, names in fields.items():
        one, other = first.get(section), second.get(section)
        if one and other:
            yield from _differing(section, one, other, names)
    if first.get("speed") and second.get("speed"):
        yield from _differing("speed", first["speed"], second["speed"], sorted({*first["speed"], *second["speed"]}))
        yield from _differing("", first, second, ("machine",))
    shown = first["calibration"], second["calibration"]
    yield from _differing_by_model("calibration.tokens", shown[0]["tokens"], shown[1]["tokens"])
    if all(calibration.get("fingerprint") for calibration in shown):
        yield from _differing("calibration", *shown, ("fingerprint",))
    yield from _differing_by_model("models", first.get("models", {}), second.get("models", {}))


def _differing(
    section: str, first: Mapping[str, Any], second: Mapping[str, Any], names: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    for name in names:
        if first.get(name) != second.get(name):
            yield f"{section}.{name}".removeprefix("."), first.get(name), second.get(name)


def _differing_by_model(
    name: str, first: Mapping[str, str], second: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    for model in first.keys() & second.keys():
        if first[model] != second[model]:
            yield f"{name} of {model}", first[model][:12], second[model][:12]


def _merged_protocol(protocols: Sequence[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for protocol in protocols:
        for name, value in protocol.items():
            merged[name] = merged.get(name) or value
    merged["models"] = {name: value for protocol in protocols for name, value in protocol.get("models", {}).items()}
    tokens = {name: value for protocol in protocols for name, value in protocol["calibration"]["tokens"].items()}
    merged["calibration"] = {**merged["calibration"], "tokens": tokens}
    return merged


def _with_unique_labels(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return cells in which a label means one method with one set of options."""
    meanings: dict[str, list[str]] = {}
    renamed = []
    for cell in cells:
        if cell["label"] == DENSE or cell["sweep"] is not None:
            renamed.append(cell)
            continue
        known = meanings.setdefault(cell["label"], [])
        meaning = json.dumps([cell["method"], cell["options"]], sort_keys=True)
        if meaning not in known:
            known.append(meaning)
        number = known.index(meaning) + 1
        renamed.append(cell if number == 1 else {**cell, "label": f"{cell['label']} ({number})"})
    return renamed
