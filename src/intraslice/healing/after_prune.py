"""`prune --heal`: a prune into the work folder of the output, then the healing of what it has left there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intraslice.checkpoint.ownership import check_intact
from intraslice.checkpoint.workfolder import LOCK, MANIFEST, Nothing, WorkFolder, settle
from intraslice.checkpoint.writer import check_apart, check_output
from intraslice.errors import IntraSliceError, NumericalError, RecipeError
from intraslice.healing.options import HealOptions
from intraslice.healing.run import check_here, heal_checkpoint
from intraslice.names import expanded
from intraslice.progress import Progress, SilentProgress
from intraslice.pruning import inputs_of, prune_recipe
from intraslice.recipes.recipe import Recipe
from intraslice.results.result import PruneResult


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
    check_here(options)
    output = expanded(recipe.output)
    check_apart(output, inputs_of(recipe))
    settle(output)
    check_output(output, overwrite, source=expanded(recipe.model))
    work = WorkFolder(output, "prune with healing")
    try:
        identity = {"prune": recipe.to_dict(), "heal": options.to_dict()}
        resume = work.begin(Nothing, identity, resume=resume, overwrite=overwrite) is not None
        work.save(Nothing(), {})
        healed = _prune_and_heal(recipe, options, work, output, resume=resume, command=command, progress=progress)
        work.publish(overwrite, healed)
    except BaseException:
        work.leave()
        raise
    work.remove()
    return PruneResult.load(output)


def _prune_and_heal(
    recipe: Recipe,
    options: HealOptions,
    work: WorkFolder,
    output: Path,
    *,
    resume: bool,
    command: str,
    progress: Progress,
) -> Path:
    """Return the folder of the healed checkpoint, in the work folder."""
    shared: dict[str, Any] = {"command": command, "progress": progress, "overwrite": False}
    pruned, healed = work.path / "pruned", work.path / "healed"
    settle(pruned)
    settle(healed)
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
    check_intact(healed, str(healed))
    return healed


@contextmanager
def _nothing_left(work: WorkFolder) -> Iterator[None]:
    """Remove the work folder when the prune was refused before anything worth keeping was finished."""
    try:
        yield
    except IntraSliceError:
        if all(path.name in (MANIFEST, LOCK) for path in work.path.iterdir()):
            work.remove()
        raise
