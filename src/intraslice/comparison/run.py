"""Runs what is missing of a comparison, keeps what is done, and writes the tables after every cell."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from intraslice.comparison.cells import (
    ANALYSIS,
    HEAL,
    PRUNE,
    SPEED,
    Facts,
    TextFacts,
    Work,
    list_cells,
    plan_work,
)
from intraslice.comparison.code import code_digest
from intraslice.comparison.document import build_cell, build_document, build_protocol, failed_cell
from intraslice.comparison.spec import ComparisonSpec, check_names
from intraslice.comparison.store import Store
from intraslice.comparison.tables import check_outputs, write_outputs
from intraslice.data.mixture import is_sampled
from intraslice.errors import ComparisonError, IntraSliceError, RecipeError, one_line
from intraslice.process import Keep, Worker
from intraslice.progress import Progress


def run_job(job: dict[str, Any], progress: Progress, keep: Keep | None = None) -> Any:
    """Run a job of `worker.py` in a process of its own, and return its result.

    Args:
        job: JSON types; "job" names the job, the rest are its arguments.
        progress: shows the steps of the job.
        keep: is called with each part of the job as soon as it is finished.

    Raises:
        ComparisonError: the job failed, or its process died.
    """
    name = f"the process of the job {job['job']!r}"
    with Worker("intraslice.comparison.worker:serve", name=name, error=ComparisonError) as worker:
        return worker.ask(job, progress, keep)


@dataclass(frozen=True)
class Planned:
    """One cell of the plan.

    Attributes:
        work: the cell and what decides it.
        to_run: names of the parts that will be run, in order; empty for a finished cell.
        prunes_again: the prune was finished before, but its checkpoint is gone and has to be made again.
    """

    work: Work
    to_run: tuple[str, ...]
    prunes_again: bool


class Comparison:
    """A checked comparison on this machine.

    Args:
        spec: what is compared.
        folder: where results are kept.
        progress: shows downloads, conversions, then the cells.

    Raises:
        IntraSliceError: a model, a text or a setting is wrong; nothing was pruned and nothing is written.
    """

    def __init__(self, spec: ComparisonSpec, folder: Path, progress: Progress) -> None:
        self.spec = spec
        self.store = Store(folder)
        self._progress = progress
        self._device = spec.options.get("run.device", "auto")
        self._bench_options = _bench_options(spec)
        cells = list_cells(spec)
        calibrations = [cell.recipe.calibration for cell in cells if cell.recipe is not None]
        found = run_job(
            {
                "job": "identify",
                "models": spec.models,
                # The first one is that of the main table.
                "calibrations": [asdict(calibration) for calibration in dict.fromkeys(calibrations)],
                "evaluation": spec.evaluation.model_dump(),
                "tasks": None if spec.tasks is None else spec.tasks.model_dump(),
                "healings": [asdict(heal) for heal in dict.fromkeys(cell.heal for cell in cells) if heal is not None],
                "device": self._device,
            },
            progress,
        )
        self.facts = {model: Facts(**facts) for model, facts in found["facts"].items()}
        self._texts = TextFacts(**found["texts"])
        self._machine, self._versions = found["machine"], found["versions"]
        self.works = [plan_work(spec, cell, self.facts[cell.model], self._texts, self._machine) for cell in cells]

    def plan(self) -> list[Planned]:
        """Say what a run would do; writes nothing."""
        return [self._planned(work) for work in self.works]

    def _planned(self, work: Work) -> Planned:
        if self.store.cell(work) is not None:
            return Planned(work, (), False)
        parts = self.store.parts(work)
        missing = [name for name in work.identities if name not in parts]
        again = False
        if missing and HEAL in parts and not self.store.healed(work).is_dir():
            missing = [HEAL, *missing]
        # A healed model is measured without the pruned one.
        needs_pruned = bool(missing) if HEAL not in work.identities else HEAL in missing
        if needs_pruned and PRUNE in parts and not self.store.checkpoint(work).is_dir():
            missing, again = [PRUNE, *missing], True
        return Planned(work, tuple(missing), again)

    def run(self, command: str = "") -> dict[str, Any]:
        """Run what is missing and return the document of the comparison, failures included.

        Args:
            command: for the record of each prune.

        Raises:
            OutputError: another run works in the folder.
        """
        failures: dict[str, str] = {}
        with self.store.locked():
            check_outputs(self.store.folder)
            # The tables are there from the start, and follow each cell.
            document = self._write(failures)
            unfinished = [work for work in self.works if self.store.cell(work) is None]
            done = len(self.works) - len(unfinished)
            if done:
                self._progress.note(f"{done} of {len(self.works)} cells are finished already")
            with self._progress.step("cells", len(self.works)) as advance:
                advance(done)
                for index, (work, remaining, started) in enumerate(_timed(unfinished)):
                    cell = None
                    try:
                        cell = self._run_cell(work, command)
                        measured = cell["perplexity"]
                        outcome = "perplexity not finite" if measured is None else f"perplexity {measured:.2f}"
                    except IntraSliceError as error:
                        failures[work.key] = one_line(error)
                        outcome = f"failed: {failures[work.key]}"
                    following = unfinished[index + 1] if remaining else None
                    if work.cell.recipe is not None and not self.spec.keep_checkpoints:
                        if following is None or not self._share_a_checkpoint(work, following):
                            self.store.drop_checkpoint(work)
                    if cell is not None:
                        # Last: a run that is killed before drops the checkpoint when it is repeated.
                        self.store.keep_cell(work, cell)
                    document = self._write(failures)
                    advance(1)
                    number = f"[{len(self.works) - remaining}/{len(self.works)}]"
                    left = _time_left(time.monotonic() - started, len(unfinished) - remaining, remaining)
                    self._progress.note(f"{number} {work.cell.title}: {outcome}{left}")
            if self.spec.analysis:
                document = self._analyze(document, failures)
        return document

    def _share_a_checkpoint(self, work: Work, other: Work) -> bool:
        return PRUNE in other.identities and self.store.checkpoint(work) == self.store.checkpoint(other)

    def _run_cell(self, work: Work, command: str) -> dict[str, Any]:
        cell, store = work.cell, self.store
        for name, result in store.parts(work).items():
            if store.part(name, work.identities[name]) is None:
                # Killed between the checkpoint and the file of the part, which outlives the checkpoint.
                store.keep_part(name, work.identities[name], result)
        missing = self._planned(work).to_run
        folder = self.facts[cell.model].folder if cell.recipe is None else str(store.checkpoint(work))
        if PRUNE in missing and not Path(folder).is_dir():
            assert cell.recipe is not None
            run = cell.recipe.run.__class__(
                **{**asdict(cell.recipe.run), "gradient_folder": str(store.scans / code_digest())}
            )
            recipe = cell.recipe.model_copy(update={"output": folder, "run": run})
            result = run_job({"job": "prune", "recipe": recipe.to_dict(), "command": command}, self._progress)
            self._check_calibration(work, result)
            store.keep_part(PRUNE, work.identities[PRUNE], result)
        if cell.heal is not None:
            pruned, folder = folder, str(store.healed(work))
            if HEAL in missing and not Path(folder).is_dir():
                job = {"job": "heal", "folder": pruned, "output": folder, "options": cell.heal.to_dict()}
                job |= {"dense": self.facts[cell.model].folder, "command": command}
                store.keep_part(HEAL, work.identities[HEAL], run_job(job, self._progress))
        measured = [name for name in missing if name not in (PRUNE, HEAL, SPEED)]
        if measured:
            job = {"job": "measure", "folder": folder, "device": self._device, "parts": measured}
            job["dense"] = self.facts[cell.model].folder
            job["evaluation"] = self.spec.evaluation.model_dump()
            job["tasks"] = None if self.spec.tasks is None else self.spec.tasks.model_dump()
            run_job(job, self._progress, lambda name, result: store.keep_part(name, work.identities[name], result))
        if SPEED in missing:
            store.keep_part(SPEED, work.identities[SPEED], self._speed(work, folder))
        parts = store.parts(work)
        return build_cell(work, parts, self.facts[cell.model])

    def _check_calibration(self, work: Work, result: dict[str, Any]) -> None:
        wanted = work.identities[PRUNE]["calibration"]
        # Sampled tokens have a fingerprint only after the sampling.
        sampled = is_sampled(work.cell.recipe.calibration.source) if work.cell.recipe is not None else False
        if not sampled and result["calibration"]["fingerprint"] != wanted:
            raise ComparisonError(
                f"the calibration text {result['calibration']['name']!r} has changed since the comparison was started; "
                "start it again."
            )

    def _speed(self, work: Work, folder: str) -> dict[str, Any]:
        """Measure the speed of a saved model, in turns with the dense one."""
        from intraslice.speed.bench import bench_models

        dense = self.facts[work.cell.model].folder
        against = None if work.cell.recipe is None else dense
        return bench_models(folder, against, options=self._bench_options, progress=self._progress).to_dict()

    def _analyze(self, document: dict[str, Any], failures: dict[str, str]) -> dict[str, Any]:
        for model, identity in self._analyses():
            if self.store.part(ANALYSIS, identity) is None:
                job = {"job": ANALYSIS, "folder": self.facts[model].folder, "device": self._device}
                job["evaluation"] = self.spec.evaluation.model_dump()
                self.store.keep_part(ANALYSIS, identity, run_job(job, self._progress))
                document = self._write(failures)
        return document

    def _analyses(self) -> Iterator[tuple[str, dict[str, Any]]]:
        evaluation = self.spec.evaluation
        for model in self.spec.models if self.spec.analysis else ():
            yield (
                model,
                {
                    "model": self.facts[model].fingerprint,
                    "text": self._texts.evaluation,
                    "seqlen": evaluation.seqlen,
                    "windows": evaluation.windows,
                    "code": code_digest(),
                },
            )

    def _write(self, failures: dict[str, str]) -> dict[str, Any]:
        names = {work.cell.model: work.cell.name for work in self.works}
        found = {names[model]: self.store.part(ANALYSIS, identity) for model, identity in self._analyses()}
        bench = None if self._bench_options is None else asdict(self._bench_options)
        protocol = build_protocol(
            self.spec, names, self.facts, self._texts, self._machine, self._versions, speed_options=bench
        )
        cells = [
            failed_cell(work, failures[work.key]) if work.key in failures else self.store.cell(work)
            for work in self.works
        ]
        document = build_document(
            self.spec.title,
            protocol,
            [cell for cell in cells if cell is not None],
            {name: analysis for name, analysis in found.items() if analysis is not None},
        )
        write_outputs(document, self.store.folder)
        return document


def _bench_options(spec: ComparisonSpec) -> Any:
    if spec.speed is None:
        return None
    from intraslice.speed.bench import BenchOptions

    check_names(spec.speed, list(BenchOptions.__dataclass_fields__), "field of speed")
    try:
        return TypeAdapter(BenchOptions).validate_python(
            {"device": spec.options.get("run.device", "auto"), **spec.speed}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RecipeError(f"{'.'.join(map(str, ('speed', *first['loc'])))}: {first['msg']}") from None


def _timed(works: Sequence[Work]) -> Iterator[tuple[Work, int, float]]:
    """Yield each cell with how many come after it and when the first was started."""
    started = time.monotonic()
    for index, work in enumerate(works):
        yield work, len(works) - index - 1, started


def _time_left(spent: float, done: int, remaining: int) -> str:
    if remaining == 0:
        return ""
    minutes = round(spent / done * remaining / 60)
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f" (about {hours}{minutes % 60} min left)"
