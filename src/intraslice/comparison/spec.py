"""The YAML file of a comparison, checked whole before anything runs and before torch is imported."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from intraslice.border import MAX_YAML_BYTES, parse_yaml, read_text
from intraslice.data.mixture import check_source, map_parts
from intraslice.errors import RecipeError, nearest
from intraslice.evaluation.task_data import DEFAULT_BATCH_SIZE
from intraslice.evaluation.text_choice import TextChoice, parse_texts, with_base
from intraslice.healing.options import HealOptions, heal_options, parse_budget
from intraslice.methods.registry import METHODS
from intraslice.names import NameKind, expanded, kind_of
from intraslice.options import CalibrationOptions
from intraslice.recipes.old_names import translate
from intraslice.recipes.recipe import Recipe, load_recipe
from intraslice.report.document import DENSE, HEALED

_TEXT_FILES = (".txt", ".jsonl", ".parquet")
_OWN_FIELDS = ("model", "revision", "output", "method", "sparsity")
# All rows of a table are healed on the text of their prune; where they run is said under `options`.
_SHARED_BY_HEALING = ("calibration", "text_field", "seed", "device", "dtype")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variant(_Section):
    """One row name of the table.

    Attributes:
        label: its name in the table; that of the method unless given.
        method: name of a preset.
        options: settings that differ from the preset, by dotted name.
    """

    label: str
    method: str
    options: dict[str, Any] = {}


class Evaluation(_Section):
    """What perplexity is measured on.

    Attributes:
        text: "builtin", a data set name (its test split) or a text file.
        texts: further texts, each as `NAME=TEXT@FIRST-LAST` (see `evaluation.text_choice`): other domains, for the log
            gap to the dense model on each of them and its mean.
        divergence: measure the KL divergence to the dense model, and how often the most likely token is the same.
        seqlen: tokens in a window.
        windows: measure at most this many windows, from the start; None measures all.
        text_field: the column of a .jsonl or .parquet file that holds the text.
        dtype: to compute in: "auto" (as stored), "float32", "bfloat16" or "float16".
    """

    text: str = "builtin"
    texts: list[str] = []
    divergence: bool = False
    seqlen: int = Field(default=2048, ge=2)
    windows: int | None = Field(default=None, ge=1)
    text_field: str | None = None
    dtype: str = "auto"

    def choices(self) -> list[TextChoice]:
        """Return all texts, the one of `text` first.

        Raises:
            CalibrationError: a text is unknown or missing.
            RecipeError: a name or windows make no sense, or two texts have one name.
        """
        return parse_texts([self.text, *self.texts], self.windows)


class Tasks(_Section):
    """Which zero-shot tasks are run.

    Attributes:
        names: names of lm-eval tasks.
        task_data: folder with one .jsonl file per task; None takes the hub's data.
        limit: measure at most this many samples of a task.
        batch_size: examples at a time.
    """

    names: list[str] = Field(min_length=1)
    task_data: str | None = None
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=DEFAULT_BATCH_SIZE, ge=1)


class Sweep(_Section):
    """One setting at several values; the perplexities make a section of their own.

    Attributes:
        option: dotted name of the setting; here also one of the calibration.
        values: its values.
        method: label of a variant, or name of a preset.
        sparsity: the sparsity at which it is varied.
    """

    option: str
    values: list[Any] = Field(min_length=1)
    method: str = "intraslice"
    sparsity: float


class ComparisonSpec(_Section):
    """A comparison, as it stands in its YAML file; paths are absolute.

    Attributes:
        title: of the table and the report.
        models: hub ids, folders, .gguf files or built-in names.
        methods: presets by name, or with a label and options.
        sparsities: what is asked of each method; run in this order.
        calibration: the text that all variants of a model share.
        evaluation: the text that perplexity is measured on.
        tasks: zero-shot tasks; None runs none.
        heal: what each pruned model of the main table is healed with, to be measured once more: a budget in tokens, or
            fields of `healing.options.HealOptions` with a budget among them. None heals nothing.
        speed: options of the benchmark; None measures no speed.
        options: settings that all variants share, by dotted name; each variant takes of them what its method reads.
        sweeps: settings at several values.
        analysis: measure spectra of the dense models and the effective rank of the layer outputs.
        keep_checkpoints: keep the pruned models; each is deleted after its last measurement otherwise.
    """

    title: str = "Comparison"
    models: list[str] = Field(min_length=1)
    methods: list[Variant] = Field(min_length=1)
    sparsities: list[float] = Field(min_length=1)
    calibration: CalibrationOptions = CalibrationOptions()
    evaluation: Evaluation = Evaluation()
    tasks: Tasks | None = None
    heal: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    options: dict[str, Any] = {}
    sweeps: list[Sweep] = []
    analysis: bool = False
    keep_checkpoints: bool = False

    @field_validator("methods", mode="before")
    @classmethod
    def _complete(cls, methods: Any) -> Any:
        """Give each variant a label and a method."""
        if not isinstance(methods, list):
            return methods
        pairs = [{"method": given} if isinstance(given, str) else given for given in methods]
        return [
            {"label": pair.get("method", "intraslice"), "method": "intraslice", **pair}
            if isinstance(pair, dict)
            else pair
            for pair in pairs
        ]

    @field_validator("heal", mode="before")
    @classmethod
    def _as_settings(cls, heal: Any) -> Any:
        """Let a budget stand alone."""
        return {"budget": str(heal)} if isinstance(heal, str | int | float) and not isinstance(heal, bool) else heal

    def variant(self, name: str) -> Variant:
        """Return the variant with a label, or the plain preset of that name."""
        found = [variant for variant in self.methods if variant.label == name]
        return found[0] if found else Variant(label=name, method=name)

    def recipe(self, model: str, variant: Variant, sparsity: float, swept: Mapping[str, Any] | None = None) -> Recipe:
        """Return the checked recipe of one prune, without its output.

        Raises:
            RecipeError: a name is unknown or a value is out of range.
        """
        flags = {"model": model, "method": variant.method, "sparsity": sparsity}
        flags |= {f"calibration.{name}": value for name, value in vars(self.calibration).items()}
        settings = {**variant.options, **(swept or {})}
        shared = {name: value for name, value in self.options.items() if name not in settings}
        return load_recipe(None, flags, _texts(settings), shared=_texts(shared))

    def healing(self, recipe: Recipe) -> HealOptions | None:
        """Return how what a recipe makes is healed, None where nothing is.

        Raises:
            RecipeError: a field of `heal` is unknown or out of range, or the budget is none in tokens.
        """
        if self.heal is None:
            return None
        settings = {name: value for name, value in self.heal.items() if name != "budget"}
        known = [name for name in HealOptions.__dataclass_fields__ if name not in _SHARED_BY_HEALING]
        for name in settings:
            if name in _SHARED_BY_HEALING:
                raise RecipeError(
                    f"heal cannot set {name!r}: every model is healed on the text and the device of its prune."
                )
        check_names(settings, known, "field of heal")
        if "budget" not in self.heal:
            raise RecipeError("the field 'heal.budget' is missing; write for example heal: 300k.")
        budget = str(self.heal["budget"])
        if parse_budget(budget).tokens is None:
            raise RecipeError(f"heal: {budget!r} is a time; give tokens, such as 300k, so that all rows get the same.")
        try:
            checked = TypeAdapter(HealOptions).validate_python({**self.heal, "budget": budget})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise RecipeError(f"{'.'.join(map(str, ('heal', *first['loc'])))}: {first['msg']}") from None
        typed = {name: getattr(checked, name) for name in settings}
        return heal_options(recipe.calibration, recipe.run.device, budget, typed)


def _texts(settings: Mapping[str, Any]) -> list[str]:
    # As texts, because these are refused with the nearest name. JSON is YAML.
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def load_spec(path: str | Path) -> ComparisonSpec:
    """Read and check the file of a comparison.

    Args:
        path: YAML file; relative paths in it are relative to its folder.

    Raises:
        RecipeError: the file cannot be read, a name is unknown, or a value is wrong or out of range.
        CalibrationError: a text is unknown or missing.
    """
    content = _read(path)
    try:
        spec = ComparisonSpec.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{str(path)!r}: {_sentence(error)}") from None
    spec = _with_absolute_paths(spec, expanded(path).absolute().parent)
    _check(spec)
    return spec


def _read(path: str | Path) -> dict[str, Any]:
    what = f"the comparison {str(path)!r}"
    content = parse_yaml(read_text(expanded(path), what, RecipeError, max_bytes=MAX_YAML_BYTES), what, RecipeError)
    if not isinstance(content, dict):
        raise RecipeError(
            f"the comparison {str(path)!r} must hold `name: value` lines with models, methods, sparsities"
        )
    return content


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _fields(first["loc"][:-1])
        return f"unknown field {name!r}; possible are {', '.join(known)}.{nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"the field {name!r} is missing"
    return f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


def _fields(place: tuple[int | str, ...]) -> list[str]:
    sections: dict[Any, type[_Section]] = {
        "methods": Variant,
        "evaluation": Evaluation,
        "tasks": Tasks,
        "sweeps": Sweep,
    }
    if place and place[0] == "calibration":
        return list(vars(CalibrationOptions()))
    return list((sections[place[0]] if place else ComparisonSpec).model_fields)


def _with_absolute_paths(spec: ComparisonSpec, base: Path) -> ComparisonSpec:
    def part(source: str) -> str:
        # A bare word is the name of a data set, so that a misspelt one gets the nearest name.
        is_file = Path(source).suffix.lower() in _TEXT_FILES or "/" in source
        return str(base / expanded(source)) if is_file else source

    def text(source: str) -> str:
        # One file beside the comparison may have a comma in its name; a mixture cannot.
        return part(source) if (base / expanded(source)).is_file() else map_parts(source, part)

    def model(name: str) -> str:
        is_name = kind_of(name, base) in (NameKind.BUILT_IN, NameKind.HUB)
        return name if is_name else str(base / expanded(name))

    tasks = spec.tasks
    if tasks is not None and tasks.task_data is not None:
        tasks = tasks.model_copy(update={"task_data": str(base / expanded(tasks.task_data))})
    sweeps = [
        sweep.model_copy(update={"values": [text(str(value)) for value in sweep.values]})
        if sweep.option == "calibration.source"
        else sweep
        for sweep in spec.sweeps
    ]
    return spec.model_copy(
        update={
            "models": [model(name) for name in dict.fromkeys(spec.models)],
            "sparsities": list(dict.fromkeys(spec.sparsities)),
            "calibration": replace(spec.calibration, source=text(spec.calibration.source)),
            "evaluation": spec.evaluation.model_copy(
                update={
                    "text": with_base(spec.evaluation.text, base),
                    "texts": [with_base(given, base) for given in spec.evaluation.texts],
                }
            ),
            "tasks": tasks,
            "sweeps": sweeps,
        }
    )


def _check(spec: ComparisonSpec) -> None:
    labels = [variant.label for variant in spec.methods]
    for label in labels:
        if labels.count(label) > 1:
            raise RecipeError(f"two methods are called {label!r}; give one of them another label.")
        if label == DENSE:
            raise RecipeError("the dense model is always measured, so no method can be called 'dense'.")
        if spec.heal is not None and label + HEALED in labels:
            raise RecipeError(f"{label + HEALED!r} is what {label!r} is called after `heal`; choose another label.")
    for variant in spec.methods:
        _check_settings(variant.options, f"options of {variant.label!r}")
    _check_settings(spec.options, "options")
    swept = [value for sweep in spec.sweeps if sweep.option == "calibration.source" for value in sweep.values]
    for source in (spec.calibration.source, *swept):
        check_source(source)
    spec.evaluation.choices()
    recipes = [
        spec.recipe(spec.models[0], variant, sparsity) for variant in spec.methods for sparsity in spec.sparsities
    ]
    for recipe in recipes:
        spec.healing(recipe)
    for name in translate(spec.options)[0]:
        section, _, field = name.partition(".")
        if field and section != "run" and not any(name in recipe.options.read() for recipe in recipes):
            raise RecipeError(f"options: none of the methods reads {name}; leave it out, or add a method that does.")
    for sweep in spec.sweeps:
        if sweep.method not in (*labels, *METHODS):
            known = [*dict.fromkeys((*labels, *METHODS))]
            raise RecipeError(
                f"unknown method {sweep.method!r} of a sweep; methods are {', '.join(known)}."
                + nearest(sweep.method, known)
            )
        if sweep.option in _OWN_FIELDS:
            raise RecipeError(f"a sweep cannot vary {sweep.option!r}; list {sweep.option} values for the main table.")
        for value in sweep.values:
            spec.recipe(spec.models[0], spec.variant(sweep.method), sweep.sparsity, {sweep.option: value})


def _check_settings(names: Iterable[str], where: str) -> None:
    for name in names:
        if name in _OWN_FIELDS:
            raise RecipeError(f"{where} cannot set {name!r}: it is a field of the comparison itself.")
        if name.startswith("calibration."):
            raise RecipeError(
                f"{where} cannot set {name!r}: all variants in a table share their calibration; set it under "
                "`calibration`, or vary it under `sweeps`."
            )


def check_names(given: Iterable[str], known: list[str], where: str) -> None:
    """Refuse a name that is not known.

    Raises:
        RecipeError: with the nearest known name.
    """
    for name in given:
        if name not in known:
            raise RecipeError(f"unknown {where} {name!r}; possible are {', '.join(known)}.{nearest(name, known)}")
