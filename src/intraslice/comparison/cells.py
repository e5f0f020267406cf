"""Which cells a comparison has, what each consists of, and the keys under which finished work is found again.

A cell is one row of the table: a model, a method and a sparsity, healed or not. Its parts (the prune, the healing, the
perplexity, each task, the speed, the effective ranks) are keyed one by one, so that another task or another text runs
only what it needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from intraslice import __version__
from intraslice.comparison.code import code_digest
from intraslice.comparison.spec import ComparisonSpec, Variant
from intraslice.healing.options import HealOptions
from intraslice.options import CalibrationOptions
from intraslice.recipes.recipe import Recipe
from intraslice.report.document import DENSE, HEALED

PRUNE, HEAL, PERPLEXITY, SPEED, RANK, TASK = "prune", "heal", "perplexity", "speed", "rank", "task-"
TEXT, DIVERGENCE = "text-", "divergence-"
ANALYSIS = "analysis"

# They say where and how the work is done, and never change a number.
_WITHOUT_EFFECT = ("gradient_folder", "boundary_bytes", "hidden_states", "max_shard_bytes")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What has to be known of a model before its cells have keys.

    Attributes:
        folder: where it is on this machine.
        fingerprint: of its config and weights.
        info: its shape, as `inspect` prints it.
        calibrations: fingerprint of the tokens by calibration (see `calibration_name`).
    """

    folder: str
    fingerprint: str
    info: dict[str, Any]
    calibrations: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """What the text files hold, whatever they are called.

    Attributes:
        evaluation: sha256 of the text that perplexity is measured on.
        texts: the same of the further texts, by name.
        calibration: the same for the calibration text; None when it is sampled from the model.
        tasks: fingerprint of the data of all tasks together, or "hub"; None without tasks.
        each_task: the same of each task by its name.
    """

    evaluation: str
    calibration: str | None
    tasks: str | None = None
    each_task: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the table, before it is measured.

    Attributes:
        model: as the file names it.
        name: the short name for the table.
        label: row name of the method.
        method: the preset, or "dense".
        options: settings that differ from the preset.
        asked: sparsity.
        sweep: the setting that is varied and its value; None in the main table.
        recipe: of the prune; None for the dense model.
        heal: how the pruned model is healed before it is measured; None does not.
    """

    model: str
    name: str
    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    asked: float = 0.0
    sweep: dict[str, Any] | None = None
    recipe: Recipe | None = None
    heal: HealOptions | None = None

    @property
    def shown_label(self) -> str:
        """Row name in the table."""
        return self.label if self.heal is None else self.label + HEALED

    @property
    def pruned_title(self) -> str:
        """Name of what is pruned, for people; the same whether it is healed or not."""
        if self.recipe is None:
            return f"{self.name} {DENSE}"
        swept = "" if self.sweep is None else f" {self.sweep['option']}={self.sweep['value']}"
        return f"{self.name} {self.label} {self.asked:g}{swept}"

    @property
    def title(self) -> str:
        """Name of the cell for people."""
        return self.pruned_title if self.heal is None else self.pruned_title + HEALED


@dataclass(frozen=True, kw_only=True)
class Work:
    """A cell with the identities of its parts.

    Attributes:
        cell: the cell.
        identities: everything that decides a part, by the part's name; in the order in which they are run.
        key: of the whole cell.
        texts: names of the texts that perplexity is measured on, that of the main table first.
    """

    cell: Cell
    identities: dict[str, dict[str, Any]]
    key: str
    texts: tuple[str, ...]


def digest(content: Any) -> str:
    """Return a short hash of JSON types."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Return the names of the models in the table: the last part of a path, unless two are the same."""
    last = {model: Path(model).name.removesuffix(".gguf") for model in models}
    return {model: name if list(last.values()).count(name) == 1 else model for model, name in last.items()}


def list_cells(spec: ComparisonSpec) -> list[Cell]:
    """Return all cells: of each model the dense one, the main table, then the sweeps."""
    return list(_cells(spec))


def _cells(spec: ComparisonSpec) -> Iterator[Cell]:
    names = short_names(spec.models)
    for model in spec.models:
        yield Cell(model=model, name=names[model], label=DENSE, method=DENSE)
        # Sparsity by sparsity: a method that does not work shows early.
        for sparsity in spec.sparsities:
            for variant in spec.methods:
                pruned = _pruned_cell(spec, model, names[model], variant, sparsity, None)
                yield pruned
                assert pruned.recipe is not None
                heal = spec.healing(pruned.recipe)
                if heal is not None:
                    # Next to it, because it begins with the same checkpoint.
                    yield replace(pruned, heal=heal)
    for model in spec.models:
        for sweep in spec.sweeps:
            for value in sweep.values:
                swept = {"option": sweep.option, "value": value}
                yield _pruned_cell(spec, model, names[model], spec.variant(sweep.method), sweep.sparsity, swept)


def _pruned_cell(
    spec: ComparisonSpec, model: str, name: str, variant: Variant, sparsity: float, sweep: dict[str, Any] | None
) -> Cell:
    swept = {} if sweep is None else {sweep["option"]: sweep["value"]}
    return Cell(
        model=model,
        name=name,
        label=variant.label,
        method=variant.method,
        options={**variant.options, **swept},
        asked=sparsity,
        sweep=sweep,
        recipe=spec.recipe(model, variant, sparsity, swept),
    )


def calibration_name(calibration: CalibrationOptions) -> str:
    """Return the name under which `Facts` keeps the fingerprint of a calibration."""
    return json.dumps(asdict(calibration))


def plan_work(spec: ComparisonSpec, cell: Cell, facts: Facts, texts: TextFacts, machine: dict[str, Any]) -> Work:
    """Say what a cell consists of and what decides each part.

    Args:
        spec: the comparison.
        cell: one of its cells.
        facts: of the cell's model.
        texts: fingerprints of the texts.
        machine: what decides a speed besides the model.
    """
    recipe = cell.recipe
    model = {"dense": facts.fingerprint} if recipe is None else _prune_identity(recipe, facts)
    device = spec.options.get("run.device", "auto")
    main, *others = spec.evaluation.choices()
    measured_on = {"seqlen": spec.evaluation.seqlen, "windows": main.windows, "text": texts.evaluation}
    if main.first:
        measured_on["first"] = main.first
    identities = {} if recipe is None else {PRUNE: model}
    if cell.heal is not None:
        # The teacher is the dense model of the prune; the text may be read beyond the calibration tokens.
        heal = {name: value for name, value in cell.heal.to_dict().items() if name != "calibration"}
        model = {"pruned": model, "heal": heal, "text": texts.calibration}
        identities[HEAL] = model
    loaded = {"model": model, "dtype": spec.evaluation.dtype, "device": device, "code": code_digest()}
    identities[PERPLEXITY] = {**loaded, **measured_on}
    on = {main.name: measured_on}
    for choice in others:
        on[choice.name] = {
            "seqlen": spec.evaluation.seqlen,
            "first": choice.first,
            "windows": choice.windows,
            "text": texts.texts[choice.name],
        }
        identities[TEXT + choice.name] = {**loaded, **on[choice.name]}
    if spec.evaluation.divergence and recipe is not None:
        for name, tokens in on.items():
            identities[DIVERGENCE + name] = {**loaded, **tokens, "dense": facts.fingerprint}
    # A sweep shows how perplexity moves; tasks and speeds of all its values would cost hours and say little.
    if cell.sweep is None:
        if spec.tasks is not None:
            for name in dict.fromkeys(spec.tasks.names):
                identities[TASK + name] = {
                    **loaded,
                    "task": name,
                    "limit": spec.tasks.limit,
                    "data": texts.each_task[name],
                }
        if spec.analysis and cell.heal is None:
            identities[RANK] = {**loaded, **measured_on}
        # A healed model has the shapes of the pruned one, and its speed.
        if spec.speed is not None and cell.heal is None:
            identities[SPEED] = {"model": model, "dense": facts.fingerprint, "options": spec.speed, **machine}
    decides = {"parts": identities, "label": cell.shown_label, "sweep": cell.sweep, "method": cell.method}
    if others:
        # The name of the main text is not in the name of its part.
        decides["main"] = main.name
    return Work(cell=cell, identities=identities, key=digest(decides), texts=tuple(on))


def _prune_identity(recipe: Recipe, facts: Facts) -> dict[str, Any]:
    decides = recipe.to_dict()
    # The budget of a cell is a sparsity: fields for other budgets must not make a finished cell a new one.
    for name in ("model", "revision", "output", "trust_remote_code", "target_parameters", "target_size"):
        del decides[name]
    decides["run"] = {name: value for name, value in decides["run"].items() if name not in _WITHOUT_EFFECT}
    calibration = facts.calibrations[calibration_name(recipe.calibration)]
    return {
        **decides,
        "model": facts.fingerprint,
        "calibration": calibration,
        "version": __version__,
        "code": code_digest(),
    }
