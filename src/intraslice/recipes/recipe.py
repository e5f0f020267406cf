"""The recipe: everything that decides a run, checked before torch is imported.

Values come from four places, and a later one wins: the presets of the method, its effort and the target, the recipe
file, the flags, `--set a.b=c`. What the method does not read is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from intraslice.errors import RecipeError, nearest
from intraslice.files import check_home
from intraslice.methods.choices import option_values
from intraslice.methods.presets import DEFAULT_EFFORT, TARGETS
from intraslice.methods.registry import METHODS, MethodEntry, MethodOptions
from intraslice.numbers import parse_count, parse_size
from intraslice.options import MAX_SPARSITY, CalibrationOptions, RunOptions
from intraslice.recipes import words
from intraslice.recipes.merge import flatten, merge, nest, parse_sets, read_file
from intraslice.recipes.old_names import named_method, translate
from intraslice.runtime.families_intraslice import FamilySpec

ALIGNMENTS = {"ffn": "ffn.ffn_multiple", "head": "attention.head_multiple", "context": "attention.context_multiple"}
"""What `--align` calls the multiples."""

# A multiple of a billion channels is beyond every model.
_ALIGN_DIGITS = 9

SIZE_TARGETS = {"target_parameters": (parse_count, "6B or 500M"), "target_size": (parse_size, "4GB or 800MB")}
"""Sizes as the budget: how they are read, and examples."""


class Recipe(BaseModel):
    """One prune, as it stands in a YAML file and in result.json.

    Attributes:
        model: hub id, local folder, GGUF file or built-in name.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: whether code that comes with the input model may be executed.
        output: folder to write.
        method: name of the preset the options started from.
        effort: how much time the method may take, also a preset; None where it has one way to run.
        target: runtime that the shapes are chosen for, also a preset.
        sparsity: fraction of the decoder layers' linear weights to remove; None until it follows from a target.
        target_speedup: how many times as fast as the dense model the pruned one should be on this machine; the other
            way to give the budget.
        target_parameters: parameters that the pruned model may have, all of them, tied ones once; another way.
        target_size: bytes that its weight files may have in the saved dtype; another way.
        speedup_of: what is to be faster.
        calibration: which text the statistics are collected on.
        run: execution settings.
        options: of the method, an instance of its options class; in files its sections stand at the top.
        notes: what the user should know about how the recipe was read; not part of files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    output: str | None = None
    method: str = "intraslice"
    effort: str | None = None
    target: str = "transformers"
    sparsity: float | None = None
    target_speedup: float | None = None
    target_parameters: int | None = None
    target_size: int | None = None
    speedup_of: Literal["decode", "prefill"] = "decode"
    calibration: CalibrationOptions = CalibrationOptions()
    run: RunOptions = RunOptions()
    options: Any = None
    notes: tuple[str, ...] = ()

    @property
    def entry(self) -> MethodEntry:
        """The row of the method."""
        return METHODS[self.method]

    def method_options(self) -> dict[str, Any]:
        """Return the options that the method reads, in sections, as JSON types."""
        options: MethodOptions = self.options
        read = options.read()
        return nest({name: value for name, value in flatten(asdict(self.options)).items() if name in read})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types: what decides the run, and nothing that has no effect."""
        fields = self.model_dump(mode="json", exclude={"options", "notes", "calibration", "run"})
        return {**fields, **self.method_options(), "calibration": asdict(self.calibration), "run": asdict(self.run)}

    def to_yaml(self) -> str:
        """Return the recipe as a file that `load_recipe` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


_OWN_FIELDS = tuple(name for name in Recipe.model_fields if name not in ("options", "notes"))


def load_recipe(
    path: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    *,
    shared: Sequence[str] = (),
) -> Recipe:
    """Merge a recipe file, flags and `--set` texts into a checked recipe.

    Args:
        path: YAML file, or None.
        flags: values by dotted name; None values are left out.
        sets: texts "a.b=c", c in YAML.
        shared: like `sets`, for several methods at once: each takes of them what it reads.

    Raises:
        RecipeError: a name is unknown, has no effect with this method, or a value is wrong or out of range.
    """
    names = words.option_names(None)
    sources = (
        flatten(read_file(path, words.SECTIONS)) if path is not None else {},
        {name: value for name, value in (flags or {}).items() if value is not None},
        parse_sets(shared, names),
        parse_sets(sets, names),
    )
    named: dict[str, Any] = {}
    for values in sources:
        named = named_method(values, named)
    method = _preset(named, "method", METHODS)
    (file_values, old_in_file), (flag_values, old_flags), (shared_values, old_shared), (set_values, old_sets) = (
        _translated(sources, METHODS[method])
    )
    given = {**file_values, **flag_values, **shared_values, **set_values}
    target = _preset(given, "target", TARGETS)
    entry = METHODS[method]
    # Earlier releases had one way to run, which is the least effort of today.
    first = next(iter(entry.efforts), None) if old_in_file else None
    effort = _effort(given.get("effort", first), entry, method)
    _check_missing(given, method)
    own = {name: value for name, value in given.items() if name.partition(".")[0] in _OWN_FIELDS}
    of_method = {name: value for name, value in given.items() if name not in own}
    own |= {name: parse(own[name]) for name, (parse, _) in SIZE_TARGETS.items() if own.get(name) is not None}
    # What somebody asks for besides an old file, or for this method alone, is asked for today.
    asked = {**flag_values, **set_values}
    of_file = {name: value for name, value in file_values.items() if old_in_file and name not in asked}
    of_all = {name: value for name, value in shared_values.items() if name not in asked}
    presets = merge(dict(entry.preset), entry.efforts.get(effort or "", {}))
    options, left_out = _method_options(entry, presets, method, target, of_method, drop={**of_file, **of_all})
    try:
        recipe = Recipe(**{**nest(own), "method": method, "effort": effort, "target": target, "options": options})
    except ValidationError as error:
        raise RecipeError(words.sentence(error, Recipe)) from None
    _check_target(recipe)
    old = [*old_in_file, *old_flags, *old_shared, *old_sets]
    dropped = [name for name in left_out if name in of_file]
    return recipe.model_copy(update={"notes": tuple(_notes(old, dropped, method))})


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe that `Recipe.to_dict` gave."""
    return load_recipe(None, flatten(values))


def _translated(sources: Sequence[Mapping[str, Any]], entry: MethodEntry) -> list[tuple[dict[str, Any], list[str]]]:
    """Return the options of each source under today's names, and its old names; a later source knows the earlier."""
    heads = entry.preset.get("attention", {}).get("heads", "adaptive")
    translated = []
    for values in sources:
        new, old = translate(values, heads)
        heads = new.get("attention.heads", heads)
        translated.append((new, old))
    return translated


def _effort(given: Any, entry: MethodEntry, method: str) -> str | None:
    """Return the effort that is made; None where the method has one way to run."""
    if not entry.efforts:
        if given is None:
            return None
        knowing = ", ".join(name for name, each in METHODS.items() if each.efforts)
        raise RecipeError(
            f"effort {given!r} was asked for, but method {method} has one way to run; {knowing} has more."
        )
    effort = DEFAULT_EFFORT if given is None else given
    if not isinstance(effort, str) or effort not in entry.efforts:
        raise RecipeError(
            f"unknown effort {effort!r}; efforts of {method} are {', '.join(entry.efforts)}."
            f"{nearest(str(effort), entry.efforts)}"
        )
    return effort


def _method_options(
    entry: MethodEntry,
    presets: Mapping[str, Any],
    method: str,
    target: str,
    given: Mapping[str, Any],
    drop: Mapping[str, Any],
) -> tuple[Any, list[str]]:
    """Return the options of a method, and the names that were left out because they have no effect.

    Args:
        entry: the row of the method.
        presets: of the method and its effort.
        method: its name.
        target: the runtime that the shapes are chosen for.
        given: options that somebody asked for, by dotted name.
        drop: those that are left out where they have no effect: of a recipe of an earlier release, which recorded
            all, or shared by several methods.

    Raises:
        RecipeError: an option is unknown, has no effect, or a value is wrong.
    """
    known = words.option_names(entry)
    presets = merge(dict(presets), _of_known(TARGETS[target], known))
    unknown = [name for name in given if name not in known]
    left_out = [name for name in unknown if name in drop and name in words.option_names(None)]
    for name in unknown:
        if name not in left_out:
            raise RecipeError(words.not_an_option(name, entry, method))
    values = merge(presets, nest({name: value for name, value in given.items() if name not in left_out}))
    try:
        options = TypeAdapter(entry.options_class).validate_python(values)
    except ValidationError as error:
        raise RecipeError(words.sentence(error, entry.options_class)) from None
    words.check_choices(options)
    if (contradiction := options.contradiction(method, target)) is not None:
        raise RecipeError(contradiction)
    read = options.read()
    for name in given:
        if name in known and name not in read:
            if name not in drop:
                raise RecipeError(words.has_no_effect(name, entry, method, read))
            left_out.append(name)
    return options, left_out


def _of_known(preset: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    return nest({name: value for name, value in flatten(preset).items() if name in known})


def _notes(old: Sequence[str], left_out: Sequence[str], method: str) -> list[str]:
    notes = []
    if old:
        notes.append(
            "names of an earlier release were read: "
            + ", ".join(f"{name} is now {words.new_name(name)}" for name in old)
            + "; the next release will not know them."
        )
    if left_out:
        notes.append(f"left out of the recipe, because method {method} does not read them: {', '.join(left_out)}.")
    return notes


def _check_target(recipe: Recipe) -> None:
    form = recipe.entry.form
    if not form.any_target and recipe.target != "transformers":
        raise RecipeError(
            f"method {recipe.method} changes what a layer is, so its models run in transformers only; leave out "
            f"--target {recipe.target}, or choose another method."
        )
    if not form.speed_target and recipe.target_speedup is not None:
        raise RecipeError(
            f"a target speedup is found by timing layers of smaller shapes, which method {recipe.method} does not "
            "make; give --sparsity instead."
        )
    for name in SIZE_TARGETS:
        if not form.size_limits and getattr(recipe, name) is not None:
            raise RecipeError(
                f"{name} counts on embeddings and head that stay what they are, but method {recipe.method} changes "
                "them as well; give --sparsity instead."
            )


def _preset(given: Mapping[str, Any], name: str, known: Mapping[str, Any]) -> str:
    value = given.get(name, Recipe.model_fields[name].default)
    if not isinstance(value, str) or value not in known:
        raise RecipeError(f"unknown {name} {value!r}; {name}s are {', '.join(known)}.{nearest(str(value), known)}")
    return value


def _check_missing(values: Mapping[str, Any], method: str) -> None:
    # Checked first and by hand: the message must not depend on what else is missing.
    if values.get("model") is None:
        raise RecipeError("no model is given; name a hub id, a folder, a .gguf file or smollm2-135m")
    budgets = [name for name in ("sparsity", "target_speedup", *SIZE_TARGETS) if values.get(name) is not None]
    if not budgets:
        raise RecipeError(
            "no sparsity is given; add --sparsity 0.3, --target-speedup 1.5, --target-parameters 6B or --target-size "
            "4GB, or a line `sparsity: 0.3` to the recipe"
        )
    if len(budgets) > 1:
        given = " and ".join(f"{name} {values[name]}" for name in budgets)
        every = "both" if len(budgets) == 2 else "all"
        decides = "the other" if len(budgets) == 2 else "the others"
        raise RecipeError(f"{given} are {every} given; one decides {decides}, so keep only one.")
    everything = words.option_names(None)
    for name in ("model", "output"):
        check_home(str(values.get(name) or ""))
    for name in values:
        if name not in everything:
            raise RecipeError(words.unknown(name, words.option_names(None, old=False)))
    _check_budget(budgets[0], values[budgets[0]])


def _check_budget(name: str, value: Any) -> None:
    if name in SIZE_TARGETS:
        parse, examples = SIZE_TARGETS[name]
        if parse(value) is None:
            raise RecipeError(f"{name} must be a number greater than 0, for example {examples}, got {value!r}")
        return
    is_sparsity = name == "sparsity"
    allowed = f"in [0, {MAX_SPARSITY})" if is_sparsity else "greater than 1"
    try:
        budget = TypeAdapter(float).validate_python(value)
    except ValidationError:
        raise RecipeError(f"{name} must be a number {allowed}, got {value!r}") from None
    if not (0 <= budget < MAX_SPARSITY if is_sparsity else budget > 1):
        raise RecipeError(f"{name} must be {allowed}, got {budget}")


def parse_align(text: str) -> dict[str, int]:
    """Return the options that `--align ffn=256,head=32` stands for.

    Raises:
        RecipeError: a name or number is wrong.
    """
    options = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in ALIGNMENTS or not number.isdecimal() or not 1 <= len(number) <= _ALIGN_DIGITS:
            raise RecipeError(
                f"--align takes name=number pairs of {', '.join(ALIGNMENTS)}, for example ffn=256,head=32; got "
                f"{text[:200]!r}"
            )
        options[ALIGNMENTS[name]] = int(number)
    return options


def fit_to_model(recipe: Recipe, spec: FamilySpec, *, hidden_size: int, norms_first: bool) -> Recipe:
    """Return the recipe with options as this model can have them.

    Args:
        recipe: as it was given.
        spec: family of the model.
        hidden_size: width of its residual stream.
        norms_first: whether norms come before the sites.

    Raises:
        RecipeError: the target cannot run the family in another shape, or the method does not fit it.
    """
    if recipe.entry.form.rotates_stream and not spec.rotatable:
        raise RecipeError(
            f"method {recipe.method} rotates the residual stream through RMSNorms, which {spec.name} does not have; it "
            f"works for {', '.join(words.rotatable_families())}. Choose another method, for example svd-llm."
        )
    if recipe.target in spec.without_targets:
        raise RecipeError(
            f"target {recipe.target} cannot run a pruned {spec.name} model, because "
            f"{spec.without_targets[recipe.target]}; use --target transformers."
        )
    if spec.output_norms and option_values(recipe.options).get("ffn.iter_pca"):
        raise RecipeError(
            f"ffn.iter_pca fits plain sums, but the blocks of {spec.name} end in norms; use ffn.iter_pca = false."
        )
    one_shape = recipe.target == "llama.cpp" and bool(spec.llama_cpp_lacks)
    if one_shape and option_values(recipe.options).get("allocation.drop_blocks"):
        raise RecipeError(
            f"allocation.drop_blocks takes whole blocks out of layers, but llama.cpp runs {spec.name} models with one "
            "shape for all layers; use --target transformers, or leave every layer its blocks."
        )
    fitted = recipe.options.fitted(
        target=recipe.target, hidden_size=hidden_size, norms_first=norms_first, one_shape=one_shape
    )
    return recipe.model_copy(update={"options": fitted})
