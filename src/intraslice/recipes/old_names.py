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
# attention.heads -> what the two options were.
_OLD_HEADS = {"adaptive": (True, False), "whole": (False, False), "all": (True, True)}
# The method that an architecture was; all others were "block".
_ARCHITECTURES = {"factors": "svd-llm", "residual": "slicegpt"}
_REFERENCES = {"block": "own_output", "model": "dense_stream"}
OLD_NAMES = (*RENAMED, *_HEADS, "architecture")
"""All names that only earlier releases had."""


def named_method(values: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"method": the method that a source of options asks for}, {} when neither it nor an earlier one does.

    An architecture of earlier releases asks for a method, too.

    Args:
        values: options of the source, by dotted name.
        earlier: what this function returned for the source before.

    Raises:
        RecipeError: the architecture is another than that of the method, or there is none of that name.
    """
    named = {"method": values["method"]} if "method" in values else dict(earlier)
    if "architecture" not in values:
        return named
    architecture, known = values["architecture"], ("block", *_ARCHITECTURES)
    if architecture not in known:
        names = ", ".join(map(repr, known))
        raise RecipeError(f"architecture must be one of {names}, got {architecture!r}; leave it out and name a method.")
    methods = _ARCHITECTURES.values()
    wanted = _ARCHITECTURES.get(architecture)
    if not named:
        return {} if wanted is None else {"method": wanted}
    if named["method"] == wanted or (wanted is None and named["method"] not in methods):
        return named
    means = f"method {wanted}" if wanted else f"all methods but {' and '.join(methods)}"
    raise RecipeError(
        f"architecture {architecture} is what earlier releases called {means}, and the method that is named is "
        f"{named['method']}; leave out the architecture, and name the method that you want."
    )


def translate(values: Mapping[str, Any], heads: str = "adaptive") -> tuple[dict[str, Any], list[str]]:
    """Return options by dotted name under today's names, and the old names that were among them.

    Args:
        values: options by dotted name.
        heads: attention.heads as it is without them. Its two old options were set one by one, so that what one of them
            means depends on the other.

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
    if any(name in values for name in _HEADS):
        # What is no name of a rule is refused elsewhere.
        was_heads = _OLD_HEADS.get(str(heads), _OLD_HEADS["adaptive"])
        adaptive, keep = (values.get(name, was) for name, was in zip(_HEADS, was_heads, strict=True))
        # Whoever kept all heads was not asked how they go.
        decides = _HEADS[1] if keep or _HEADS[0] not in values else _HEADS[0]
        _give(new, decides, "attention.heads", "all" if keep else "adaptive" if adaptive else "whole")
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
