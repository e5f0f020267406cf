"""A prune: a list of stages over one work folder, the writer last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from intraslice.checkpoint.reader import Checkpoint
from intraslice.checkpoint.workfolder import settle
from intraslice.checkpoint.writer import check_output
from intraslice.data.calibration import Calibration
from intraslice.engine.rundir import RunDir
from intraslice.engine.stages import FinishStage, LayersStage, PlanStage, Run, Stage, TuneStage, WriteStage, versions
from intraslice.methods.base import Context, Method
from intraslice.options import RunOptions
from intraslice.placement import Placement, dtype_name, threads
from intraslice.progress import Progress
from intraslice.results.result import PruneResult
from intraslice.streaming.model import StreamedModel


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done.

    Attributes:
        checkpoint: the opened dense checkpoint.
        calibration: token ids [N, T] and where they come from.
        method: what decides the weights.
        method_name: its name.
        options: the options that it reads, in sections; JSON types.
        sparsity: fraction of the decoder layers' linear weights to remove.
        budget_from: what the sparsity follows from, when it was measured; measured again it might be another one, so
            that a resumed run keeps the one it began with.
        run: execution settings.
        output: folder to write.
        overwrite: replace an existing output, and drop an interrupted run.
        resume: go on with an interrupted run.
        recipe: the full recipe, for the record.
        command: the command line, for the record.
        progress: shows what is going on.
    """

    checkpoint: Checkpoint
    calibration: Calibration
    method: Method
    method_name: str
    options: dict[str, Any]
    sparsity: float
    budget_from: str | None = None
    run: RunOptions
    output: Path
    overwrite: bool
    resume: bool
    recipe: dict[str, Any]
    command: str
    progress: Progress

    def identity(self, placement: Placement, batch: int) -> dict[str, Any]:
        """Return everything that decides the result."""
        tokens = self.calibration.tokens
        identity = {
            "model": self.checkpoint.identity(),
            "calibration": {
                "name": self.calibration.source,
                "num_samples": tokens.shape[0],
                "seqlen": tokens.shape[1],
                "seed": self.calibration.seed,
                "fingerprint": self.calibration.fingerprint,
                **({"parts": self.calibration.parts} if self.calibration.parts else {}),
            },
            "method": {"form": type(self.method).__name__, "sparsity": self.sparsity, **self.options},
            "dtype": dtype_name(placement.save_dtype),
            "device": placement.device.type,
            "compute": dtype_name(placement.compute_dtype),
            "matmul": self.run.matmul,
            "batch_tokens": batch * tokens.shape[1],
            "versions": versions(),
        }
        return identity if self.budget_from is None else {**identity, "target_speedup": self.budget_from}


class Clock:
    """Wall-clock seconds: of this process by stage, and in total with what interrupted runs spent before.

    Args:
        before: seconds of the interrupted runs.
    """

    def __init__(self, before: float) -> None:
        self._started = self._mark = time.monotonic()
        self._before = before
        self.stages: dict[str, float] = {}

    def add(self, seconds: float) -> None:
        """Count work of another run that this one uses as if it had been done in this stage."""
        self._mark -= seconds
        self._before += seconds

    def end_stage(self, name: str) -> None:
        """Give the time since the last stage ended a name."""
        now = time.monotonic()
        self.stages[name] = round(now - self._mark, 3)
        self._mark = now

    def total(self) -> float:
        """Return all seconds so far."""
        return self._before + time.monotonic() - self._started


def prune_checkpoint(job: Job, stages: Sequence[Stage] | None = None) -> PruneResult:
    """Prune a checkpoint and write the smaller one to `job.output`.

    Work happens in `<output>.partial`; the output folder appears under its name when it is whole.

    Args:
        job: what is to be done.
        stages: in order; plan, layers, tune, finish and write unless given. The last one leaves the result.

    Raises:
        IntraSliceError: whatever a user can mend; nothing appears under the output then.
    """
    stages = stages or (PlanStage(), LayersStage(), TuneStage(), FinishStage(), WriteStage())
    settle(job.output)
    check_output(job.output, job.overwrite, source=job.checkpoint.folder)
    placement = Placement.choose(job.run.device, job.run.dtype, job.checkpoint.dtype)
    placement.reset_peak()
    num_sequences, seqlen = job.calibration.tokens.shape
    batch = batch_size(num_sequences, seqlen, job.run.batch_tokens)
    identity = job.identity(placement, batch)
    for stage in stages:
        identity |= stage.identity(job)
    work = RunDir(job.output, identity, resume=job.resume, overwrite=job.overwrite)
    clock = Clock(work.seconds)
    if work.records or work.plan:
        job.progress.note(f"resuming: {len(work.records)} of {job.checkpoint.num_layers} layers are finished")
    with work:
        with torch.random.fork_rng(devices=[]), threads(work.threads):
            torch.manual_seed(job.calibration.seed)
            context = Context(
                model=StreamedModel(job.checkpoint, placement, (batch, seqlen)),
                tokens=job.calibration.tokens,
                sparsity=job.sparsity,
                run=job.run,
                folder=work.path,
                identity=identity,
                progress=job.progress,
            )
            run = Run(job=job, context=context, work=work, clock=clock)
            for stage in stages:
                stage.run(run)
                clock.end_stage(stage.name)
        result = run.finished_result()
        work.publish(job.overwrite)
        work.remove()
    return result


def batch_size(num_sequences: int, seqlen: int, batch_tokens: int) -> int:
    """Return the largest divisor of the number of sequences that fits: all batches then share masks and shapes."""
    wanted = max(1, batch_tokens // seqlen)
    return max(size for size in range(1, num_sequences + 1) if num_sequences % size == 0 and size <= wanted)
