"""The recipe: everything that decides a run, checked before torch is imported.

Values come from four places, and a later one wins: the preset of the method, the recipe file, the flags,
`--set a.b=c`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from intraslice.errors import RecipeError, nearest, one_line
from intraslice.methods.blockwise.options import AllocationOptions, AttentionOptions, FFNOptions, MethodOptions
from intraslice.methods.presets import METHODS, TARGETS
from intraslice.options import RunOptions

MAX_SPARSITY = 0.95

_WITHOUT_TARGET = {("llama.cpp", "opt"), ("stock", "opt")}
# llama.cpp has no OPT, and the OPT class derives the head width from the number of heads.

_ROTATED_FAMILIES = ("llama", "mistral", "qwen2", "phi3")
# A rotation passes through an RMSNorm unchanged, not through the LayerNorm of OPT.

ALIGNMENTS = {"ffn": "ffn.ffn_multiple", "head": "attention.head_multiple", "context": "attention.context_multiple"}
"""What `--align` calls the multiples."""


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Which text the statistics are collected on.

    Attributes:
        source: a data set name, a file, "self" or "builtin".
        num_samples: number of token blocks.
        seqlen: tokens in a block.
        seed: of the choice of blocks, and of the sampling for "self".
        text_field: the column of a .jsonl or .parquet file that holds the text.
    """

    __pydantic_config__ = {"extra": "forbid"}

    source: str = "builtin"
    num_samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    text_field: str | None = None


class Recipe(BaseModel):
    """One prune, as it stands in a YAML file and in result.json.

    Attributes:
        model: hub id, local folder, GGUF file or built-in name.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: whether code that comes with the input model may be executed.
        output: folder to write.
        method: name of the preset the options started from.
        target: runtime that the shapes are chosen for, also a preset.
        sparsity: fraction of the decoder layers' linear weights to remove; None until it follows from target_speedup.
        target_speedup: how many times as fast as the dense model the pruned one should be on this machine; the other
            way to give the budget.
        speedup_of: what is to be faster.
        architecture: what becomes smaller; see MethodOptions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    output: str | None = None
    method: str = "intraslice"
    target: str = "transformers"
    sparsity: float | None = None
    target_speedup: float | None = None
    speedup_of: Literal["decode", "prefill"] = "decode"
    architecture: Literal["block", "factors", "residual"] = "block"
    allocation: AllocationOptions = AllocationOptions()
    attention: AttentionOptions = AttentionOptions()
    ffn: FFNOptions = FFNOptions()
    calibration: CalibrationOptions = CalibrationOptions()
    run: RunOptions = RunOptions()

    def method_options(self) -> MethodOptions:
        """Return the part that the compressors and allocators read."""
        assert self.sparsity is not None, "a sparsity has to be chosen first"
        return MethodOptions(
            sparsity=self.sparsity,
            architecture=self.architecture,
            allocation=self.allocation,
            attention=self.attention,
            ffn=self.ffn,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the recipe as a file that `load_recipe` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


@dataclass(frozen=True)
class _Range:
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    multiple: int = 1

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and (self.multiple == 1 or value % self.multiple == 0)

    def __str__(self) -> str:
        if math.isinf(self.high):
            text = f"{'greater than' if self.low_open else 'at least'} {self.low:g}"
        else:
            opening, closing = "(["[not self.low_open], ")]"[not self.high_open]
            text = f"in {opening}{self.low:g}, {self.high:g}{closing}"
        return text if self.multiple == 1 else f"{text} and a multiple of {self.multiple}"


_RANGES: dict[str, _Range] = {
    "sparsity": _Range(0, MAX_SPARSITY, high_open=True),
    "target_speedup": _Range(1, low_open=True),
    "allocation.ffn_bias": _Range(0, low_open=True),
    "allocation.similarity_scale": _Range(0),
    "allocation.max_block_sparsity": _Range(0, 1, low_open=True, high_open=True),
    "allocation.num_ffn_blocks": _Range(1),
    "attention.min_head_fraction": _Range(0, 1),
    "attention.head_multiple": _Range(2, multiple=2),
    "attention.context_multiple": _Range(1),
    "attention.damping": _Range(0, low_open=True),
    "ffn.damping": _Range(0, low_open=True),
    "ffn.ffn_multiple": _Range(1),
    "ffn.iter_pca_fraction": _Range(0, 1),
    "ffn.iter_pca_rounds": _Range(1),
    "ffn.iter_pca_slice": _Range(0),
    "ffn.iter_pca_steps": _Range(1),
    "ffn.iter_pca_lr": _Range(0, low_open=True),
    "calibration.num_samples": _Range(1),
    "calibration.seqlen": _Range(2),
    "calibration.seed": _Range(0),
    "run.batch_tokens": _Range(1),
    "run.boundary_bytes": _Range(1),
    "run.max_shard_bytes": _Range(1 << 20),
}


def load_recipe(
    path: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
) -> Recipe:
    """Merge a recipe file, flags and `--set` texts into a checked recipe.

    Args:
        path: YAML file, or None.
        flags: values by dotted name; None values are left out.
        sets: texts "a.b=c", c in YAML.

    Raises:
        RecipeError: a name is unknown or a value is wrong or out of range.
    """
    file_values = _read_file(path) if path is not None else {}
    given = _merge(file_values, _nest({name: value for name, value in (flags or {}).items() if value is not None}))
    given = _merge(given, _nest(_parse_sets(sets)))
    method, target = (_preset(given, name, known) for name, known in (("method", METHODS), ("target", TARGETS)))
    # Section by section: both presets may set fields of the same one.
    values = _merge(_merge(METHODS[method], TARGETS[target]), given)
    # Checked first and by hand: the message must not depend on what else is missing.
    _check_missing(values)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_sentence(error)) from None
    _check_ranges(recipe)
    if recipe.allocation.shapes != "free" and recipe.allocation.name != "mask_gradient":
        raise RecipeError(
            f"target {recipe.target} chooses shapes by mask gradients, which allocation.name = "
            f"{recipe.allocation.name} (method {recipe.method}) does not rank; use --target transformers, or "
            "--set allocation.name=mask_gradient."
        )
    if recipe.architecture != "block" and recipe.target != "transformers":
        raise RecipeError(
            f"method {recipe.method} changes what a layer is, so its models run in transformers only; leave out "
            f"--target {recipe.target}, or choose another method."
        )
    if recipe.architecture != "block" and recipe.target_speedup is not None:
        raise RecipeError(
            f"a target speedup is found by timing layers of smaller shapes, which method {recipe.method} does not "
            "make; give --sparsity instead."
        )
    return recipe


def _preset(given: Mapping[str, Any], name: str, known: Mapping[str, Any]) -> str:
    value = given.get(name, Recipe.model_fields[name].default)
    if not isinstance(value, str) or value not in known:
        raise RecipeError(f"unknown {name} {value!r}; {name}s are {', '.join(known)}.{nearest(str(value), known)}")
    return value


def parse_align(text: str) -> dict[str, int]:
    """Return the options that `--align ffn=256,head=32` stands for.

    Raises:
        RecipeError: a name or number is wrong.
    """
    options = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in ALIGNMENTS or not number.isdecimal():
            raise RecipeError(
                f"--align takes name=number pairs of {', '.join(ALIGNMENTS)}, for example ffn=256,head=32; got {text!r}"
            )
        options[ALIGNMENTS[name]] = int(number)
    return options


def fit_to_model(recipe: Recipe, family: str, hidden_size: int) -> Recipe:
    """Return the recipe with the FFN multiple that helps this model.

    K-quants need rows of a multiple of 256 weights. Where hidden_size is none, most matrices of the model cannot have
    them, and steps as coarse as that would cost quality for nothing.

    Raises:
        RecipeError: the target cannot run the architecture in another shape, or the method does not fit it.
    """
    if recipe.architecture == "residual" and family not in _ROTATED_FAMILIES:
        raise RecipeError(
            f"method {recipe.method} rotates the residual stream through RMSNorms, which {family} does not have; it "
            f"works for {', '.join(_ROTATED_FAMILIES)}. Choose another method, for example svd-llm."
        )
    if (recipe.target, family) in _WITHOUT_TARGET:
        raise RecipeError(f"target {recipe.target} cannot run a pruned {family} model; use --target transformers.")
    multiple = recipe.ffn.ffn_multiple
    if recipe.target != "llama.cpp" or hidden_size % multiple == 0:
        return recipe
    return recipe.model_copy(update={"ffn": replace(recipe.ffn, ffn_multiple=math.gcd(multiple, hidden_size))})


def option_names() -> list[str]:
    """Return the dotted names that a recipe or `--set` may give."""
    return list(_names(Recipe.model_fields.items()))


def _names(items: Iterable[tuple[str, Any]], prefix: str = "") -> Iterator[str]:
    for name, info in items:
        section = info.annotation
        if is_dataclass(section):
            yield from (f"{prefix}{name}.{field.name}" for field in fields(section))
        else:
            yield f"{prefix}{name}"


def _sections() -> set[str]:
    return {name.split(".")[0] for name in option_names() if "." in name}


def _read_file(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"the recipe {str(path)!r} cannot be read: {reason}") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe {str(path)!r} is not YAML: {one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RecipeError(f"the recipe {str(path)!r} must hold `name: value` lines, got {type(content).__name__}")
    for name, value in content.items():
        if name in _sections() and not isinstance(value, dict):
            raise RecipeError(f"recipe section {name!r} must hold `name: value` lines, got {value!r}")
    return {str(name): value for name, value in content.items()}


def _parse_sets(sets: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in sets:
        name, separator, value = text.partition("=")
        name = name.strip()
        if not separator or not name:
            raise RecipeError(f"--set takes name=value, for example ffn.iter_pca=false; got {text!r}")
        if name not in option_names():
            raise RecipeError(_unknown(name))
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"the value of --set {name} cannot be read: {value!r}") from None
    return values


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, rest = name.partition(".")
        if rest:
            nested.setdefault(section, {})[rest] = value
        else:
            nested[section] = value
    return nested


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in top.items():
        below = merged.get(name)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[name] = {**below, **value} if both else value  # pyright: ignore[reportGeneralTypeIssues]
    return merged


def _check_missing(values: Mapping[str, Any]) -> None:
    if values.get("model") is None:
        raise RecipeError("no model is given; name a hub id, a folder, a .gguf file or smollm2-135m")
    sparsity, speedup = values.get("sparsity"), values.get("target_speedup")
    if sparsity is None and speedup is None:
        raise RecipeError(
            "no sparsity is given; add --sparsity 0.3 or --target-speedup 1.5, or a line `sparsity: 0.3` to the recipe"
        )
    if sparsity is not None and speedup is not None:
        raise RecipeError(
            f"sparsity {sparsity} and target_speedup {speedup} are both given; one decides the other, so keep only one."
        )
    unknown = [name for name in values if name not in Recipe.model_fields]
    if unknown:
        raise RecipeError(_unknown(unknown[0]))
    name = "target_speedup" if sparsity is None else "sparsity"
    try:
        budget = TypeAdapter(float).validate_python(values[name])
    except ValidationError:
        raise RecipeError(f"{name} must be a number {_RANGES[name]}, got {values[name]!r}") from None
    _check_range(name, budget)


def _check_ranges(recipe: Recipe) -> None:
    for name in _RANGES:
        section, _, rest = name.partition(".")
        value = getattr(recipe, section)
        value = getattr(value, rest) if rest else value
        if value is not None:
            _check_range(name, value)


def _check_range(name: str, value: float) -> None:
    if value not in _RANGES[name]:
        raise RecipeError(f"{name} must be {_RANGES[name]}, got {value}")


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "literal_error":
        known = _literals(name)
        choices = ", ".join(map(repr, known))
        return f"{name} must be one of {choices}, got {first['input']!r}.{nearest(str(first['input']), known)}"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return _unknown(name)
    return f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


def _literals(name: str) -> tuple[str, ...]:
    section, _, field = name.partition(".")
    annotation = Recipe.model_fields[section].annotation
    return get_args(get_type_hints(annotation)[field] if field else annotation)


def _unknown(name: str) -> str:
    names = option_names()
    # The last part alone is tried as well: people write iter_pca for ffn.iter_pca.
    hint = nearest(name, names)
    if not hint:
        close = difflib.get_close_matches(name.rpartition(".")[2], [full.rpartition(".")[2] for full in names], n=1)
        hint = "".join(f" Did you mean {full!r}?" for full in names if [full.rpartition(".")[2]] == close)
    return f"unknown option {name!r}.{hint or ' Options are ' + ', '.join(names) + '.'}"
