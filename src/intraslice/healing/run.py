"""Healing from its settings: what they name is opened and checked, then the Trainer starts; at the end a folder."""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from intraslice.checkpoint.ownership import LIST_FILE
from intraslice.checkpoint.reader import Checkpoint
from intraslice.checkpoint.tensorfile import DTYPES
from intraslice.checkpoint.workfolder import settle
from intraslice.checkpoint.writer import INDEX_FILE, assemble, check_apart, check_output
from intraslice.data.mixture import check_source
from intraslice.errors import CheckpointError, MissingExtraError, NumericalError, RecipeError
from intraslice.files import write_text, writing
from intraslice.healing.data import HealingText, load_healing_text
from intraslice.healing.loss import Distillation
from intraslice.healing.options import HealOptions, num_steps, parse_budget
from intraslice.healing.source import Student, check_hidden_states, config_with_dtype, open_student, open_teacher
from intraslice.healing.workdir import HealDir
from intraslice.loading import load_model
from intraslice.names import expanded
from intraslice.options import CalibrationOptions
from intraslice.placement import Placement, accelerator_index, choose_device, dtype_from_name, dtype_name, threads
from intraslice.progress import Progress, SilentProgress
from intraslice.quiet import quiet
from intraslice.results.healing import HealingRecord
from intraslice.results.model_card import render
from intraslice.results.result import RESULT_FILE

HEALING_FILE = "healing.json"
"""Holds the record where the folder has no result.json."""

_SHARD_BYTES = 1 << 30
_NOT_COPIED = (RESULT_FILE, HEALING_FILE, "README.md", INDEX_FILE, LIST_FILE)


@dataclass(frozen=True, kw_only=True)
class HealResult:
    """A finished healing.

    Attributes:
        output: folder of the checkpoint.
        record: how it went; it stands in result.json as `healing`.
    """

    output: str
    record: HealingRecord

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {"output": self.output, "healing": self.record.to_dict()}


def heal_checkpoint(
    checkpoint: str,
    output: Path,
    options: HealOptions,
    *,
    teacher: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    command: str = "",
    shown_as: str | None = None,
    progress: Progress | None = None,
) -> HealResult:
    """Train a pruned checkpoint to agree with its dense model, and write it to another folder.

    Work happens in `<output>.partial`; the output folder appears under its name when it is whole.

    Args:
        checkpoint: folder that `prune` has written, or a stock folder exported from one.
        output: folder to write.
        options: settings.
        teacher: the dense model; None takes the one that result.json names.
        revision: branch, tag or commit of the teacher on the hub.
        trust_remote_code: whether code that comes with the teacher's tokenizer may run.
        overwrite: replace an existing output, and drop an interrupted run.
        resume: go on with an interrupted run.
        command: the command line, for the record.
        shown_as: what the record calls the output, if it moves on from `output`.
        progress: shows the work.

    Raises:
        IntraSliceError: whatever a user can mend; nothing appears under the output then.
    """
    progress = progress or SilentProgress()
    check_here(options)
    inputs = {"input model": checkpoint, "teacher": teacher or "", "calibration text": options.calibration or ""}
    check_apart(output, {what: given for what, given in inputs.items() if given})
    settle(output)
    check_output(output, overwrite, source=expanded(checkpoint))
    if options.calibration is not None:
        check_source(options.calibration)
    student = open_student(checkpoint)
    dense = open_teacher(student, teacher, revision=revision, trust_remote_code=trust_remote_code, progress=progress)
    source = options.calibration or _default_source(student)
    check_source(source)
    check_apart(output, {"teacher": dense.folder, "calibration text": source})
    _check_sizes(student, dense, options)
    placement = Placement.choose(options.device, options.dtype, student.dtype)
    placement.reset_peak()
    identity = {
        "checkpoint": student.identity(),
        "teacher": dense.identity(),
        "versions": _versions(options),
        **{name: value for name, value in options.to_dict().items() if name != "calibration"},
        "calibration": source,
        "device": placement.device.type,
    }
    with HealDir(output, identity, resume=resume, overwrite=overwrite) as work:
        job = _Job(student, dense, options, source, work, placement, progress, command)
        with torch.random.fork_rng(devices=[]), threads(work.threads):
            record = _heal(job, shown_as or str(output))
        work.publish(overwrite)
        work.remove()
    return HealResult(output=shown_as or str(output), record=record)


@dataclass(frozen=True)
class _Job:
    student: Student
    dense: Checkpoint
    options: HealOptions
    source: str
    work: HealDir
    placement: Placement
    progress: Progress
    command: str


def _heal(job: _Job, output: str) -> HealingRecord:
    from intraslice.healing.trainer import load_best, train, trained

    options, work = job.options, job.work
    torch.manual_seed(options.seed)
    student, teacher = _load_models(job)
    _check_unchanged(job)
    model = _prepare(student, options)
    distillation = Distillation(student, teacher, hidden_weight=options.hidden_weight, task_weight=options.task_weight)
    steps = work.steps or _plan_steps(job, distillation)
    text = load_healing_text(job.dense, job.source, options, steps, job.progress)
    work.settle(steps, text.fingerprint)
    if work.step:
        job.progress.note(f"resuming: {work.step} of {steps} steps are finished")
    stopped = None
    if work.step < steps:
        with quiet("transformers", "accelerate", "peft", everything=True):
            stopped = train(model, distillation, text, options, steps, work, job.placement, job.progress)
    if work.best.step == 0:
        _refuse(work, stopped)
    if stopped is not None:
        job.progress.note(f"stopped early: {stopped}; the weights of step {work.best.step} are kept")
    load_best(model, work)
    # Weights that are used where they lie in the file change with it.
    _check_unchanged(job)
    record = _record(job, steps, text, stopped, sum(tensor.numel() for tensor in trained(model).values()))
    if options.weights == "lora":
        student = model.merge_and_unload()
    _write(job, student.to("cpu"), record, output)
    return record


def _check_unchanged(job: _Job) -> None:
    job.student.check_unchanged()
    job.dense.check_unchanged()


def _versions(options: HealOptions) -> dict[str, str]:
    packages = ("intraslice", "torch", "transformers", "accelerate", *(["peft"] if options.weights == "lora" else []))
    return {name: version(name) for name in packages}


def _refuse(work: HealDir, stopped: str | None) -> None:
    if stopped is None:
        lowest = min(point.kl for point in work.curve[1:])
        reason = f"the held-out divergence never fell below its start (from {work.curve[0].kl:.4f} to {lowest:.4f})"
    else:
        reason = f"it diverged: {stopped}"
    # Going on from the same states would end in the same way.
    work.step = 0
    raise NumericalError(f"healing has not helped, {reason}; try a lower --lr. Nothing was written.")


def check_here(options: HealOptions) -> None:
    """Refuse to begin what cannot run on this machine: packages are missing, or the Trainer does not take the device.

    Raises:
        MissingExtraError: a package that healing needs is not installed.
        RecipeError: the device is not there, or an accelerator but not the first one.
    """
    for package in ["accelerate", *(["peft"] if options.weights == "lora" else [])]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(f"healing needs the package {package}: pip install 'intraslice[heal]'") from error
    index = accelerator_index(choose_device(options.device))
    # The Trainer moves the student to the first one, whichever is current.
    if index:
        raise RecipeError(
            f"healing runs on the first accelerator that the process sees, and device {options.device!r} is number "
            f"{index}; make it the first, for example with CUDA_VISIBLE_DEVICES={index}, and leave out --device."
        )


def _default_source(student: Student) -> str:
    # The record of the tokens names files without their folders; the recipe has them as they were given.
    recipe = {} if student.result is None else student.result.recipe.get("calibration") or {}
    known = recipe.get("source") or (None if student.result is None else student.result.calibration.get("name"))
    return known or CalibrationOptions().source


def _check_sizes(student: Student, dense: Checkpoint, options: HealOptions) -> None:
    longest = dense.config.max_position_embeddings
    if options.seqlen > longest:
        raise RecipeError(
            f"seqlen {options.seqlen} is beyond the {longest} positions of the model; use --seqlen {longest} or less."
        )
    if options.hidden_weight:
        check_hidden_states(student, dense)
    budget = parse_budget(options.budget)
    if budget.tokens is not None:
        num_steps(budget.tokens, options)


def _load_models(job: _Job) -> tuple[Any, Any]:
    device = job.options.device
    # What is trained is float32 everywhere: small steps get lost in half precision.
    student, _ = load_model(job.student.name, dtype="float32", device=device)
    # The teacher's products are rounded in any case then: half the memory, and no weight to round in each step. An
    # accelerator takes it as it is stored.
    on_cpu = job.placement.device.type == "cpu"
    cpu_dtype = "bfloat16" if job.options.rounds(on_cpu) else "float32"
    teacher, _ = load_model(str(job.dense.folder), dtype=cpu_dtype if on_cpu else "auto", device=device)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return student, teacher


def _prepare(student: Any, options: HealOptions) -> Any:
    """Return the model that is trained, with gradients only where they are wanted."""
    if options.weights == "lora":
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        with quiet("peft", everything=True):
            return get_peft_model(student, settings)
    if not options.train_embeddings:
        for module in student.modules():
            if isinstance(module, torch.nn.Embedding):
                module.requires_grad_(False)
        student.get_output_embeddings().requires_grad_(False)
    return student


def _plan_steps(job: _Job, distillation: Distillation) -> int:
    """Return the number of steps of the budget; one in seconds is divided by the time that a step takes here."""
    options = job.options
    budget = parse_budget(options.budget)
    if budget.tokens is not None:
        return num_steps(budget.tokens, options)
    assert budget.seconds is not None
    size = options.batch_size // options.accumulate
    tokens = torch.randint(job.dense.config.vocab_size, (size, options.seqlen)).to(job.placement.device)
    # As the Trainer computes: its backward passes are outside of it as well.
    rounded = partial(job.placement.autocast, options.rounds(job.placement.device.type == "cpu"))
    with job.progress.step("measuring the speed of a step", 2) as advance:
        for _ in range(2):  # the first one also warms up
            started = time.monotonic()
            with rounded():
                loss = distillation.loss(tokens)
            loss.backward()
            job.placement.synchronize()
            step_seconds = (time.monotonic() - started) * options.accumulate
            advance(1)
    started = time.monotonic()
    with rounded():
        distillation.held_out(tokens, size)
    measure_seconds = (time.monotonic() - started) * options.held_out / size
    distillation.forget_gradients()
    steps = int((budget.seconds - 2 * measure_seconds) / step_seconds)
    steps = int(
        (budget.seconds - 2 * measure_seconds) / (step_seconds + measure_seconds / options.evaluation_steps(steps))
    )
    if steps < 1:
        raise RecipeError(
            f"budget {options.budget!r} is smaller than one step, which takes about {step_seconds:.1f} seconds here, "
            f"and two measurements of {measure_seconds:.1f} seconds; give more, or a smaller --held-out."
        )
    job.progress.note(f"{steps} steps of {step_seconds:.2f} seconds fit into {options.budget}")
    return steps


def _record(job: _Job, steps: int, text: HealingText, stopped: str | None, trained_parameters: int) -> HealingRecord:
    curve = tuple(job.work.curve)
    before = job.student.result.healing if job.student.result is not None else None
    return HealingRecord(
        teacher=job.dense.name,
        checkpoint=job.student.name,
        options=job.options.to_dict(),
        steps=steps,
        learning_rate=job.options.peak_lr,
        calibration={
            "name": text.source,
            "num_samples": len(text.train),
            "held_out": len(text.held_out),
            "seqlen": job.options.seqlen,
            "seed": job.options.seed,
            "fingerprint": text.fingerprint,
        },
        curve=curve,
        best_step=job.work.best.step,
        stopped=stopped,
        trained_parameters=trained_parameters,
        seconds=curve[-1].seconds,
        tokens_per_second=round(curve[-1].tokens / max(curve[-1].seconds, 1e-9), 1),
        peak_memory_bytes=job.placement.peak_memory_bytes(),
        versions={**_versions(job.options), "python": platform.python_version()},
        device=str(job.placement.device),
        command=job.command,
        previous=None if before is None else before.to_dict(),
    )


def _write(job: _Job, model: Any, record: HealingRecord, output: str) -> None:
    """Write the folder: the files of the student, with new weights under their names and in their shapes."""
    student, staging, dtype = job.student, job.work.staging, job.options.dtype
    with writing(staging):
        staging.mkdir(parents=True)
        for path in sorted(student.folder.iterdir()):
            if path.is_file() and path.name not in _NOT_COPIED and path.suffix != ".safetensors":
                shutil.copyfile(path, staging / path.name)
    wanted = None if dtype == "auto" else dtype_from_name(dtype)
    if wanted is not None:
        write_text(staging / "config.json", config_with_dtype(staging / "config.json", dtype_name(wanted)))
    state, tensors = model.state_dict(), {}
    for name, stored in student.tensors.items():
        if name not in state or tuple(state[name].shape) != stored.shape:
            raise CheckpointError(f"weight {name!r} of {student.name!r} is not one of its model; prune again.")
        kind = DTYPES[stored.dtype]
        tensors[name] = state[name].to(wanted if wanted is not None and kind.is_floating_point else kind)
    written = assemble(staging, [], [], tensors, _SHARD_BYTES)
    if student.result is None:
        write_text(staging / HEALING_FILE, json.dumps(record.to_dict(), indent=2) + "\n")
        return
    result = replace(student.result, output=output, pruned_bytes=written, healing=record)
    if wanted is not None:
        result = replace(result, dtype=dtype_name(wanted))
    write_text(staging / RESULT_FILE, result.to_json())
    write_text(staging / "README.md", render(result))
