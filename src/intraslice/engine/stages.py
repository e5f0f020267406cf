"""The stages of a run: plan, layers, tune, finish, write. Each does what the work folder says is missing."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

import torch
import transformers

from intraslice.checkpoint.tensorfile import count_parameters
from intraslice.checkpoint.writer import assemble, save_side_files
from intraslice.files import write_text
from intraslice.methods.base import Context, Outside
from intraslice.placement import dtype_name, matmul_precision
from intraslice.results.model_card import render
from intraslice.results.result import RESULT_FILE, LayerRecord, PruneResult
from intraslice.runtime.configuration_intraslice import composite_config, pruned_config

if TYPE_CHECKING:
    from intraslice.engine.run import Clock, Job
    from intraslice.engine.rundir import RunDir


def versions() -> dict[str, str]:
    """Return the versions of what computes; other ones may round differently."""
    return {
        "intraslice": version("intraslice"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@dataclass(kw_only=True)
class Run:
    """What stages share: the job, the run as a method sees it, and what is finished.

    Attributes:
        job: what is to be done.
        context: for the method.
        work: the work folder, which survives an interruption.
        clock: seconds by stage.
        state: what the method carries from layer to layer.
        outside: what is stored besides the layers.
        result: left by the last stage, without the seconds of that stage.
    """

    job: Job
    context: Context
    work: RunDir
    clock: Clock
    state: Any = None
    outside: Outside | None = None
    result: PruneResult | None = None

    def finished_result(self) -> PruneResult:
        """Write the record and the model card, now that all stages have their seconds; return the result."""
        assert self.result is not None, "the last stage leaves a result"
        seconds = {**self.clock.stages, "total": round(self.clock.total(), 3)}
        result = self.result.with_seconds(seconds)
        write_text(self.work.staging / RESULT_FILE, result.to_json())
        write_text(self.work.staging / "README.md", render(result, composite=self.job.checkpoint.composite is not None))
        return result


class Stage(Protocol):
    """One step of a run."""

    @property
    def name(self) -> str:
        """Under which its seconds are recorded."""
        ...

    def identity(self, job: Job) -> dict[str, Any]:
        """Return what decides its result besides what decides the others'."""
        ...

    def run(self, run: Run) -> None:
        """Do what is missing, and keep it in the work folder."""
        ...


class _Stage:
    def identity(self, job: Job) -> dict[str, Any]:
        """Return nothing: the job decides."""
        return {}


class PlanStage(_Stage):
    """What is decided for all layers before the first one changes."""

    name = "plan"

    def run(self, run: Run) -> None:
        """Let the method plan, unless an interrupted run has."""
        if run.work.plan is not None:
            return
        run.clock.add(run.job.method.plan_seconds(run.context))
        with matmul_precision(fast=run.job.run.matmul != "exact-gradients"):
            plan = run.job.method.plan(run.context)
        run.context.release()
        run.work.keep_plan(plan, run.clock.total())


class LayersStage(_Stage):
    """Layer after layer: the statistics of a layer come from the outputs of the layers already pruned."""

    name = "layers"

    def run(self, run: Run) -> None:
        """Let the method change what is not finished; finished layers are only passed through."""
        with matmul_precision(fast=run.job.run.matmul == "fast"):
            self._run(run)
        run.context.release()

    def _run(self, run: Run) -> None:
        method, context, work = run.job.method, run.context, run.work
        model = context.model
        assert work.plan is not None
        if work.records and not method.resumes:
            context.progress.note(
                f"{run.job.method_name} goes from layer to layer in one run: the finished ones are made again"
            )
            work.forget_layers()
        run.state = method.open(context, work.plan, work.carry if work.records else None)
        model.release()
        with context.progress.step("layers", total=model.num_layers) as advance:
            for index in range(model.num_layers):
                if index < len(work.records):
                    layer = model.load_pruned_layer(index, work.records[index].shape, work.load_layer(index))
                    method.replay(context, run.state, index, layer)
                else:
                    self._one_layer(run, index)
                advance(1)

    def _one_layer(self, run: Run, index: int) -> None:
        started = time.monotonic()
        model = run.context.model
        layer = model.load_layer(index)
        outcome = run.job.method.layer(run.context, run.state, index, layer)
        model.placement.synchronize()
        record = LayerRecord(
            layer=index,
            shape=outcome.shape,
            num_parameters=outcome.num_weights,
            errors=dict(outcome.errors),
            heads=outcome.heads,
            seconds=round(time.monotonic() - started, 3),
            **outcome.extra,
        )
        tensors = model.stored_tensors(layer) if outcome.tensors is None else outcome.tensors
        run.work.commit(record, tensors, outcome.carry, run.clock.total())


class TuneStage(_Stage):
    """All layers together, after the last one."""

    name = "tune"

    def run(self, run: Run) -> None:
        """Let the method train them, unless an interrupted run has."""
        if run.work.tuned is not None:
            return
        with matmul_precision(fast=run.job.run.matmul != "exact-gradients"):
            tuned = run.job.method.tune(run.context, run.work)
        run.context.release()
        if tuned is not None:
            run.work.keep_tuned(tuned, run.clock.total())


class FinishStage(_Stage):
    """What changes outside of the decoder layers."""

    name = "finish"

    def run(self, run: Run) -> None:
        """Read the other tensors of the dense model, and let the method change them."""
        save = run.context.placement.save_dtype
        tensors = {name: tensor.to(save) for name, tensor in run.job.checkpoint.load_rest().items()}
        run.outside = run.job.method.finish(run.context, run.state, tensors)


class WriteStage(_Stage):
    """The checkpoint, in the work folder; it is renamed when everything is there."""

    name = "write"

    def run(self, run: Run) -> None:
        """Write weights, config, tokenizer and the code that travels with them."""
        job, work, outside = run.job, run.work, run.outside
        assert outside is not None
        checkpoint, save = job.checkpoint, run.context.placement.save_dtype
        config = pruned_config(
            checkpoint.config,
            checkpoint.spec,
            [record.shape for record in work.records],
            method=job.method_name,
            recipe=job.recipe,
            changes=dict(outside.config),
        )
        config.dtype = save
        if checkpoint.composite is not None:
            config = composite_config(checkpoint.composite.config, config)
            config.dtype = save
        layers = range(checkpoint.num_layers)
        written = assemble(
            work.staging,
            [work.layer_path(index) for index in layers],
            [checkpoint.saved_name(checkpoint.layer_prefix(index)) for index in layers],
            {checkpoint.saved_name(name): tensor for name, tensor in outside.tensors.items()},
            job.run.max_shard_bytes,
            checkpoint.carried,
        )
        run.outside = None
        checkpoint.check_side_files()
        save_side_files(work.staging, config, checkpoint.folder)
        run.result = self._result(run, written)

    def _result(self, run: Run, written: int) -> PruneResult:
        job, placement = run.job, run.context.placement
        records = tuple(run.work.records)
        dense_layers = run.context.model.sites.num_weights
        kept = sum(record.num_parameters for record in records)
        dense = job.checkpoint.num_parameters()
        return PruneResult(
            output=str(job.output),
            model=job.checkpoint.name,
            family=job.checkpoint.spec.name,
            method=job.method_name,
            requested_sparsity=job.sparsity,
            sparsity=1.0 - kept / dense_layers,
            dense_layer_parameters=dense_layers,
            pruned_layer_parameters=kept,
            dense_parameters=dense,
            pruned_parameters=count_parameters(run.work.staging),
            dense_bytes=dense * placement.save_dtype.itemsize,
            pruned_bytes=written,
            layers=records,
            seconds={},
            peak_memory_bytes=placement.peak_memory_bytes(),
            calibration=run.context.identity["calibration"],
            versions={**versions(), "python": platform.python_version()},
            device=str(placement.device),
            dtype=dtype_name(placement.save_dtype),
            recipe=job.recipe,
            command=job.command,
            tuned=run.work.tuned,
        )
