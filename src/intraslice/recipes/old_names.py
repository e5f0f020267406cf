"""Option names of earlier releases: read for one release, with a note."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intraslice.errors import RecipeError

RENAMED = {
    "allocation.name": "allocation.rule",
    "allocation.ffn_bias": "allocation.ffn_share",
    "allocation.count": "allocation.budget_unit",
    "allocation.shapes": "allocation.shape_freedom",
    "allocation.max_block_sparsity": "allocation.max_site_sparsity",
    "allocation.num_ffn_blocks": "allocation.num_channel_groups",
    "attention.groups": "attention.gqa_groups",
    "attention.target": "attention.repair_against",
    "ffn.target": "ffn.repair_against",
    "run.scan_folder": "run.gradient_folder",
}
"""Old dotted name -> today's."""

_HEADS = ("attention.adaptive_heads", "attention.keep_heads")
_REFERENCES = {"block": "own_output", "model": "dense_stream"}
OLD_NAMES = (*RENAMED, *_HEADS, "architecture")
"""All names that only earlier releases had."""


def translate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return options by dotted name under today's names, and the old names that were among them.

    Args:
        values: options by dotted name.

    Raises:
        RecipeError: an option is given under its old and its new name, with different values.
    """
    old = [name for name in values if name in OLD_NAMES]
    if not old:
        return dict(values), []
    new = {name: value for name, value in values.items() if name not in old}
    for name in old:
        if name in RENAMED:
            value = values[name]
            _give(new, name, RENAMED[name], _REFERENCES.get(value, value) if name.endswith(".target") else value)
    if values.get(_HEADS[1]):
        _give(new, _HEADS[1], "attention.heads", "all")
    elif _HEADS[0] in values:
        _give(new, _HEADS[0], "attention.heads", "adaptive" if values[_HEADS[0]] else "whole")
    # One number was both lambdas.
    for section in ("attention", "ffn"):
        if values.get(f"{section}.score") == "obs" and f"{section}.damping" in values:
            new.setdefault(f"{section}.obs_damping", values[f"{section}.damping"])
    return new, old


def _give(values: dict[str, Any], old: str, new: str, value: Any) -> None:
    if values.setdefault(new, value) != value:
        raise RecipeError(
            f"{old} is what earlier releases called {new}, and the two are given different values, {value!r} and "
            f"{values[new]!r}; keep only {new}."
        )
