"""A prune from its recipe: what it names is opened and checked, then the engine starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from intraslice.checkpoint.composite import load_arguments
from intraslice.checkpoint.gguf import cache_folder
from intraslice.checkpoint.reader import Checkpoint
from intraslice.checkpoint.source import open_checkpoint
from intraslice.checkpoint.workfolder import settle
from intraslice.checkpoint.writer import check_apart, check_output
from intraslice.data.calibration import Calibration, load_calibration
from intraslice.data.mixture import check_source, is_sampled, parse_source, share_out
from intraslice.data.sampling import sampling_bytes
from intraslice.data.text import SAMPLED
from intraslice.data.windows import first_token
from intraslice.engine.run import Job, batch_size, prune_checkpoint
from intraslice.engine.rundir import interrupted_sparsity
from intraslice.errors import RecipeError
from intraslice.inspection import ModelInfo, compute_width, estimate_peak_bytes, family_of, inspect_model
from intraslice.layers.decoder import norms_come_first
from intraslice.loading import load_config
from intraslice.methods.choices import load
from intraslice.names import expanded
from intraslice.options import CalibrationOptions, RunOptions
from intraslice.placement import Placement, choose_device, dtype_from_name, peak_resident_bytes
from intraslice.progress import Progress, SilentProgress
from intraslice.recipes.recipe import Recipe, fit_to_model
from intraslice.results.result import PruneResult
from intraslice.runtime.families_intraslice import FamilySpec
from intraslice.streaming.boundaries import boundary_states_bytes, chunk_size
from intraslice.target_size import note_when_larger, sparsity_for_size


def prune_recipe(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    command: str = "",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Run a recipe; the arguments are those of `prune`, and a folder to write in the place of the recipe's output."""
    progress = progress or SilentProgress()
    if recipe.output is None:
        raise RecipeError("no output is given; name the folder to write with -o.")
    output = folder or expanded(recipe.output)
    check_apart(output, inputs_of(recipe))
    settle(output)
    check_output(output, overwrite)
    # Before the model is opened, which may mean a long download: a wrong name must answer at once.
    check_source(recipe.calibration.source)
    checkpoint = open_checkpoint(
        recipe.model,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        progress=progress,
    )
    recipe = fitted_recipe(recipe, checkpoint.config, checkpoint.spec)
    _check_composite(recipe, checkpoint.composite.model_type if checkpoint.composite else None)
    for note in recipe.notes:
        progress.note(note)
    check_seqlen(checkpoint.config, recipe.calibration.seqlen)
    begun_with = interrupted_sparsity(output) if resume else None
    recipe = _with_sparsity(
        recipe, checkpoint.config, checkpoint.dtype, checkpoint.num_parameters(), begun_with, progress
    )
    calibration = calibrate(checkpoint, recipe.calibration, device=recipe.run.device, progress=progress)
    job = make_job(
        recipe,
        checkpoint,
        calibration,
        output=output,
        overwrite=overwrite,
        resume=resume,
        command=command,
        progress=progress,
    )
    result = prune_checkpoint(job)
    note_when_larger(recipe, result, progress)
    return result


def make_job(
    recipe: Recipe,
    checkpoint: Checkpoint,
    calibration: Calibration,
    *,
    output: Path,
    overwrite: bool = False,
    resume: bool = False,
    command: str = "",
    progress: Progress,
) -> Job:
    """Return what the engine is asked to do.

    Args:
        recipe: fitted to the model, with a sparsity.
        checkpoint: the opened dense model.
        calibration: its calibration tokens.
        output: folder to write.
        overwrite: replace an existing output, and drop an interrupted run.
        resume: go on with an interrupted run.
        command: the command line, for the record.
        progress: shows the work.
    """
    assert recipe.sparsity is not None, "a sparsity has to be chosen first"
    measured = f"{recipe.speedup_of} {recipe.target_speedup:g}" if recipe.target_speedup is not None else None
    return Job(
        checkpoint=checkpoint,
        calibration=calibration,
        method=recipe.entry.build(recipe.options),
        method_name=recipe.method,
        options=recipe.method_options(),
        sparsity=recipe.sparsity,
        budget_from=measured,
        run=recipe.run,
        output=output,
        overwrite=overwrite,
        resume=resume,
        recipe=recipe.to_dict(),
        command=command,
        progress=progress,
    )


def fitted_recipe(recipe: Recipe, config: Any, spec: FamilySpec) -> Recipe:
    """Return the recipe with options as this model can have them; `fit_to_model` says what may be refused.

    Args:
        recipe: as it was given.
        config: stock config of the dense model.
        spec: its family.
    """
    return fit_to_model(recipe, spec, hidden_size=config.hidden_size, norms_first=norms_come_first(spec, config))


def _with_sparsity(
    recipe: Recipe,
    config: Any,
    stored: torch.dtype,
    num_parameters: int,
    begun_with: float | None,
    progress: Progress,
) -> Recipe:
    """Return the recipe with the sparsity that its target asks for.

    Args:
        recipe: with a sparsity, or with a target: a speedup, a number of parameters or a size.
        config: stock config of the dense model.
        stored: dtype of its weights.
        num_parameters: all of its parameters, tied ones once.
        begun_with: sparsity recorded by the interrupted run; a new measurement could give another value.
        progress: shows the measurement.
    """
    dtype = stored if recipe.run.dtype == "auto" else dtype_from_name(recipe.run.dtype)
    if recipe.target_parameters is not None or recipe.target_size is not None:
        sparsity = sparsity_for_size(recipe, config, family_of(config), num_parameters=num_parameters, dtype=dtype)
        progress.note(f"sparsity {sparsity:g} of the decoder layers' weights; everything else stays")
        return recipe.model_copy(update={"sparsity": sparsity})
    if recipe.target_speedup is None:
        return recipe
    if begun_with is not None:
        progress.note(f"sparsity {begun_with:g}, as the interrupted run has chosen")
        return recipe.model_copy(update={"sparsity": begun_with})
    sparsity = load(recipe.entry.form.speed_target)(
        config,
        family_of(config),
        recipe.options,
        speedup=recipe.target_speedup,
        speedup_of=recipe.speedup_of,
        placement=Placement(choose_device(recipe.run.device), dtype, dtype, torch.float32),
        progress=progress,
    )
    return recipe.model_copy(update={"sparsity": sparsity})


def calibrate(
    checkpoint: Checkpoint, wanted: CalibrationOptions, *, device: str, progress: Progress | None
) -> Calibration:
    """Return the calibration tokens that the options name, cut by the tokenizer of the checkpoint.

    Raises:
        CalibrationError: the text is missing, empty, too short, or does not fit the model.
        RecipeError: the sequences are longer than the model has positions.
    """
    check_seqlen(checkpoint.config, wanted.seqlen)
    # Minutes, which each cell of a comparison and each resumed run would spend again.
    sampled = is_sampled(wanted.source)
    folder = cache_folder() / "sampled" / checkpoint.fingerprint()[:32] if sampled else None
    return load_calibration(
        wanted.source,
        checkpoint.load_tokenizer(),
        num_samples=wanted.num_samples,
        seqlen=wanted.seqlen,
        seed=wanted.seed,
        vocab_size=checkpoint.config.vocab_size,
        model_folder=checkpoint.folder,
        model_arguments=load_arguments(checkpoint.config, of_composite=checkpoint.composite is not None),
        progress=progress,
        text_field=wanted.text_field,
        device=device,
        sampled_folder=folder,
        starts_with=first_token(checkpoint.config),
    )


def _sampling_peak_bytes(info: ModelInfo, config: Any, calibration: CalibrationOptions, run: RunOptions) -> int:
    """Estimate the peak memory while calibration text is sampled, in bytes; 0 where none is."""
    parts = parse_source(calibration.source)
    counts = share_out(parts, calibration.num_samples)
    rows = sum(count for part, count in zip(parts, counts, strict=True) if part.source in SAMPLED)
    if not rows:
        return 0
    place = choose_device(run.device)
    process = peak_resident_bytes() if place.type == "cpu" else 0
    itemsize = (config.dtype or torch.float32).itemsize
    return process + sampling_bytes(config, info.num_parameters, itemsize, rows, calibration.seqlen, place)


def check_seqlen(config: Any, seqlen: int) -> None:
    """Refuse sequences longer than the model has positions.

    Raises:
        RecipeError: seqlen is larger than max_position_embeddings.
    """
    if seqlen > config.max_position_embeddings:
        raise RecipeError(
            f"seqlen {seqlen} is beyond the {config.max_position_embeddings} positions of the model; "
            f"use --seqlen {config.max_position_embeddings} or less."
        )


def _check_composite(recipe: Recipe, model_type: str | None) -> None:
    if model_type is not None and recipe.entry.form.rotates_stream:
        raise RecipeError(
            f"method {recipe.method} narrows the residual stream of the text tower, into which the other towers of "
            f"this {model_type} model write; choose another method, for example intraslice."
        )


def inputs_of(recipe: Recipe) -> dict[str, str]:
    """Return what a prune reads, by what messages call it; what is no file or folder of this machine is among it."""
    parts = parse_source(recipe.calibration.source)
    return {"input model": recipe.model, **{f"calibration text ({part.source})": part.source for part in parts}}


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a prune would do.

    Attributes:
        dense: the model as it is.
        target_layer_parameters: linear weights of the decoder layers to keep.
        target_parameters: all parameters of the pruned model, tied ones once.
        estimated_peak_bytes: rough peak memory.
        gradient_chunks: into how many chunks the gradient pass cuts the calibration text; each one loads all layers
            twice. 0 without a gradient pass.
        one_chunk_bytes: the boundary_bytes with which there would be one chunk.
        recipe: every setting, with the sparsity that follows from a target.
    """

    dense: ModelInfo
    target_layer_parameters: int
    target_parameters: int
    estimated_peak_bytes: int
    gradient_chunks: int
    one_chunk_bytes: int
    recipe: Recipe


def dry_run(recipe: Recipe, *, progress: Progress | None = None) -> DryRun:
    """Say what a recipe would do; writes nothing and loads no weights."""
    opened = {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
    info = inspect_model(recipe.model, **opened)
    config = load_config(recipe.model, **opened)
    progress = progress or SilentProgress()
    recipe = fitted_recipe(recipe, config, family_of(config))
    _check_composite(recipe, info.composite)
    for note in recipe.notes:
        progress.note(note)
    recipe = _with_sparsity(recipe, config, config.dtype or torch.float32, info.num_parameters, None, progress)
    assert recipe.sparsity is not None
    preview = recipe.entry.build(recipe.options).preview(info, recipe.sparsity)
    kept = round((1 - recipe.sparsity) * info.dense_layer_parameters)
    outside = preview.outside_parameters
    if outside is None:
        outside = info.num_parameters - info.dense_layer_parameters
    calibration, run = recipe.calibration, recipe.run
    width = compute_width(run)
    batch = batch_size(calibration.num_samples, calibration.seqlen, run.batch_tokens)
    states = boundary_states_bytes(len(info.layers), calibration.seqlen, info.hidden_size, width)
    chunks = -(-calibration.num_samples // chunk_size(run.boundary_bytes, states, batch))
    return DryRun(
        dense=info,
        target_layer_parameters=kept,
        target_parameters=outside + kept,
        estimated_peak_bytes=max(
            estimate_peak_bytes(info, calibration.num_samples, calibration.seqlen, run) + 4 * preview.held_numbers,
            _sampling_peak_bytes(info, config, calibration, run),
        ),
        gradient_chunks=chunks if preview.reads_gradients else 0,
        one_chunk_bytes=states * calibration.num_samples,
        recipe=recipe,
    )
