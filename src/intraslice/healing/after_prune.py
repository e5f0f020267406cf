"""`prune --heal`: a prune into the work folder of the output, then the healing of what it has left there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intraslice.checkpoint.writer import check_output, publish
from intraslice.engine.rundir import check_identity, flatten
from intraslice.errors import CheckpointError, IntraSliceError, NumericalError, OutputError, RecipeError
from intraslice.files import write_text
from intraslice.healing.options import HealOptions
from intraslice.healing.run import check_extras, heal_checkpoint
from intraslice.names import expanded
from intraslice.progress import Progress, SilentProgress
from intraslice.pruning import prune_recipe
from intraslice.recipes.recipe import Recipe
from intraslice.results.result import PruneResult

_MANIFEST = "manifest.json"


def prune_and_heal(
    recipe: Recipe,
    options: HealOptions,
    *,
    overwrite: bool = False,
    resume: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> PruneResult:
    """Prune by a recipe, then heal the result with the same model as the teacher.

    Both work in `<output>.partial`; the output folder appears under its name when it is whole.

    Args:
        recipe: of the prune; its output is that of the whole.
        options: of the healing.
        overwrite: replace an existing output, and drop an interrupted run.
        resume: go on with an interrupted run.
        command: the command line, for the record.
        progress: shows the work.

    Raises:
        IntraSliceError: as of the two; nothing appears under the output then.
    """
    progress = progress or SilentProgress()
    if recipe.output is None:
        raise RecipeError("no output is given; name the folder to write with -o.")
    check_extras(options)
    output = expanded(recipe.output)
    check_output(output, overwrite, source=expanded(recipe.model))
    work = output.with_name(output.name + ".partial")
    resume = _open(work, {"prune": recipe.to_dict(), "heal": options.to_dict()}, resume=resume, overwrite=overwrite)
    pruned, healed = work / "pruned", work / "healed"
    shared: dict[str, Any] = {"command": command, "progress": progress, "overwrite": False}
    if not healed.exists():
        if not pruned.exists():
            with _nothing_left(work):
                prune_recipe(recipe, folder=pruned, resume=resume, **shared)
        try:
            heal_checkpoint(
                str(pruned),
                healed,
                options,
                teacher=recipe.model,
                revision=recipe.revision,
                trust_remote_code=recipe.trust_remote_code,
                resume=resume,
                shown_as=str(output),
                **shared,
            )
        except NumericalError as error:
            raise NumericalError(f"{error} The pruned model is in {str(pruned)!r}.") from error
    publish(healed, output, overwrite)
    shutil.rmtree(work)
    return PruneResult.load(output)


@contextmanager
def _nothing_left(work: Path) -> Iterator[None]:
    """Remove the work folder when the prune was refused before anything worth keeping was finished."""
    try:
        yield
    except IntraSliceError:
        if [path.name for path in work.iterdir()] == [_MANIFEST]:
            shutil.rmtree(work)
        raise


def _open(work: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> bool:
    """Make the work folder; return whether an interrupted run in it goes on."""
    manifest = work / _MANIFEST
    settings = json.loads(json.dumps(flatten(identity)))
    if resume and manifest.exists():
        try:
            old = json.loads(manifest.read_text(encoding="utf-8"))["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{manifest} is not readable ({error}); pass --overwrite to start again.") from error
        check_identity(old, settings, work)
        return True
    if work.exists() and any(work.iterdir()):
        if not overwrite:
            raise OutputError(
                f"an interrupted run is in {str(work)!r}; pass --resume to continue it, or --overwrite to start again."
            )
        shutil.rmtree(work)
    write_text(manifest, json.dumps({"identity": settings}, indent=1))
    return False
