"""Recipe files, `--set` texts, and options by dotted name or in sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intraslice.border import MAX_YAML_BYTES, parse_yaml, read_text
from intraslice.errors import RecipeError
from intraslice.names import expanded
from intraslice.recipes import words


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of sections by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": content for inner, content in value.items()})
        else:
            flat[name] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted name in sections: the inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, rest = name.partition(".")
        if rest:
            nested.setdefault(section, {})[rest] = value
        else:
            nested[section] = value
    return nested


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `top` above it, section by section."""
    return nest({**flatten(base), **flatten(top)})


def read_file(path: str | Path, sections: Sequence[str]) -> dict[str, Any]:
    """Return the content of a recipe file.

    Args:
        path: YAML file.
        sections: names that must hold `name: value` lines.

    Raises:
        RecipeError: it cannot be read, or is not a recipe.
    """
    what = f"the recipe {str(path)!r}"
    content = parse_yaml(read_text(expanded(path), what, RecipeError, max_bytes=MAX_YAML_BYTES), what, RecipeError)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RecipeError(f"the recipe {str(path)!r} must hold `name: value` lines, got {type(content).__name__}")
    for name, value in content.items():
        if name in sections and not isinstance(value, dict):
            raise RecipeError(f"recipe section {name!r} must hold `name: value` lines, got {value!r}")
        # Without a line in it nothing else would look at its name.
        if value == {} and name not in sections:
            raise RecipeError(words.unknown(str(name), sections))
    return {str(name): value for name, value in content.items()}


def parse_sets(sets: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """Return what `--set a.b=c` texts say, by dotted name.

    Args:
        sets: the texts; c in YAML.
        known: all names of options.

    Raises:
        RecipeError: a text has no name or no value, or names no option.
    """
    values: dict[str, Any] = {}
    for text in sets:
        name, separator, value = text.partition("=")
        name = name.strip()
        if not separator or not name:
            raise RecipeError(f"--set takes name=value, for example ffn.iter_pca=false; got {text!r}")
        if name not in known:
            raise RecipeError(words.unknown(name, words.option_names(None, old=False)))
        values[name] = parse_yaml(value, f"the value of --set {name}", RecipeError)
    return values
