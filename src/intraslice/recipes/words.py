"""What a recipe says when something is wrong: names of options, their values, and the nearest that would do."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel, ValidationError

from intraslice.errors import RecipeError, nearest
from intraslice.methods.choices import OneOf, readers
from intraslice.methods.registry import METHODS, MethodEntry
from intraslice.options import CalibrationOptions, RunOptions
from intraslice.recipes.old_names import OLD_NAMES, RENAMED
from intraslice.runtime.families_intraslice import FAMILIES

_GENERAL = (
    *("model", "revision", "trust_remote_code", "output", "method", "effort", "target", "sparsity", "target_speedup"),
    *("target_parameters", "target_size", "speedup_of"),
)


def _names(section: str, options: type) -> Iterator[str]:
    yield from (f"{section}.{field.name}" for field in fields(options))


def _sections(options: type) -> dict[str, type]:
    """Return the sections of a method's options by name."""
    return {name: hint for name, hint in get_type_hints(options).items() if is_dataclass(hint)}  # type: ignore[misc]


def option_names(entry: MethodEntry | None, *, old: bool = True) -> list[str]:
    """Return the dotted names that a recipe or `--set` may give.

    Args:
        entry: names of its method's own options only; None names all options of all methods.
        old: with those of earlier releases, when all are named.
    """
    if entry is not None:
        return [
            name for section, options in _sections(entry.options_class).items() for name in _names(section, options)
        ]
    methods = [name for each in METHODS.values() for name in option_names(each)]
    general = [*_GENERAL, *_names("calibration", CalibrationOptions), *_names("run", RunOptions)]
    return [*_GENERAL, *dict.fromkeys(methods), *general[len(_GENERAL) :], *(OLD_NAMES if old else ())]


SECTIONS = tuple(dict.fromkeys(name.partition(".")[0] for name in option_names(None) if "." in name))
"""Names that hold `name: value` lines in a recipe file."""


def new_name(name: str) -> str:
    """Return today's name of an option of an earlier release."""
    return {"architecture": "method"}.get(name) or RENAMED.get(name, "attention.heads")


def rotatable_families() -> list[str]:
    """Return the families whose residual stream may be rotated."""
    return [spec.name for spec in FAMILIES.values() if spec.rotatable]


def unknown(name: str, names: Sequence[str]) -> str:
    """Return the sentence for a name that is no option."""
    # The last part alone is tried as well: people write iter_pca for ffn.iter_pca.
    hint = nearest(name, names)
    if not hint:
        close = difflib.get_close_matches(name.rpartition(".")[2], [full.rpartition(".")[2] for full in names], n=1)
        hint = "".join(f" Did you mean {full!r}?" for full in names if [full.rpartition(".")[2]] == close)
    return f"unknown option {name!r}.{hint or ' Options are ' + ', '.join(names) + '.'}"


def not_an_option(name: str, entry: MethodEntry, method: str) -> str:
    """Return the sentence for an option that a method's form does not have."""
    if name not in option_names(None):
        return unknown(name, option_names(None, old=False))
    own = option_names(entry)
    if not own:
        return (
            f"method {method} does not read {name}; it follows from the sparsity alone and has no options of its own."
        )
    return f"method {method} does not read {name}.{_nearest_of(name, own)}"


def has_no_effect(name: str, entry: MethodEntry, method: str, read: Collection[str]) -> str:
    """Return the sentence for an option that nothing reads as the method is composed."""
    reasons = list(readers(name, entry.choices()))
    because = f" (only {' or '.join(reasons)} would)" if reasons else ""
    return f"method {method} as given does not read {name}{because}.{_nearest_of(name, sorted(read))}"


def _nearest_of(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f" The nearest that it reads is {found[0]}." if found else ""


def check_choices(options: Any) -> None:
    """Refuse a value that is not among the names of its table.

    Raises:
        RecipeError: with the names that there are.
    """
    for section in fields(options):
        inner = getattr(options, section.name)
        for name, hint in get_type_hints(type(inner), include_extras=True).items():
            for rows in (item for item in _metadata(hint) if isinstance(item, OneOf)):
                value = getattr(inner, name)
                if value not in rows.names():
                    raise RecipeError(_not_one_of(f"{section.name}.{name}", value, rows.names()))


def _not_one_of(name: str, value: Any, known: Sequence[str]) -> str:
    choices = ", ".join(map(repr, known))
    return f"{name} must be one of {choices}, got {value!r}.{nearest(str(value), known)}"


def sentence(error: ValidationError, owner: type) -> str:
    """Return what is wrong first.

    Args:
        error: what pydantic found.
        owner: the model or dataclass that it checked.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    hint = _hint(owner, [str(part) for part in first["loc"]])
    if first["type"] == "literal_error":
        return _not_one_of(name, first["input"], _bare_args(hint))
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown(name, option_names(None, old=False))
    if allowed := range_text(hint):
        if first["type"] in _OUT_OF_RANGE:
            return f"{name} must be {allowed}, got {first['input']}"
    return f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "multiple_of")


def _hint(owner: type, location: Sequence[str]) -> Any:
    """Return the annotation of the field at a location, with its metadata."""
    hint: Any = owner
    for part in location:
        base = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if not (isinstance(base, type) and (is_dataclass(base) or issubclass(base, BaseModel))):
            return None
        hint = get_type_hints(base, include_extras=True).get(part)
    return hint


def _metadata(hint: Any) -> tuple[Any, ...]:
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def _bare_args(hint: Any) -> tuple[Any, ...]:
    return get_args(get_args(hint)[0] if get_origin(hint) is Annotated else hint)


def range_text(hint: Any) -> str:
    """Return the range of an annotated number as text, "" when there is none."""
    low = high = multiple = None
    low_open = high_open = False
    for item in _metadata(hint):
        if isinstance(item, Gt | Ge):
            low, low_open = (item.gt, True) if isinstance(item, Gt) else (item.ge, False)
        elif isinstance(item, Lt | Le):
            high, high_open = (item.lt, True) if isinstance(item, Lt) else (item.le, False)
        elif isinstance(item, MultipleOf):
            multiple = item.multiple_of
    if low is None:
        return ""
    if high is None:
        text = f"{'greater than' if low_open else 'at least'} {_number(low)}"
    else:
        opening, closing = "(["[not low_open], ")]"[not high_open]
        text = f"in {opening}{_number(low)}, {_number(high)}{closing}"
    return text if multiple is None else f"{text} and a multiple of {multiple}"


def _number(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
