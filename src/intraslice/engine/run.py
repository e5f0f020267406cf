"""The whole prune as one readable function: allocate, prune layer by layer, write, publish."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from intraslice import __version__
from intraslice.checkpoint.reader import Checkpoint
from intraslice.checkpoint.writer import assemble, check_output, publish, save_side_files
from intraslice.data.calibration import Calibration
from intraslice.engine.rundir import RunDir
from intraslice.errors import BudgetError
from intraslice.files import write_text
from intraslice.methods.blockwise.allocators import BlockSizes
from intraslice.methods.blockwise.gradient_pass import scan_seconds
from intraslice.methods.blockwise.layer import LayerBudget, propagate_layer, prune_layer
from intraslice.methods.blockwise.options import MethodOptions
from intraslice.methods.blockwise.plan import allocate, kept_scan_path, reads_gradients
from intraslice.methods.slicegpt.method import rotate_rest, slice_layers
from intraslice.methods.svd_llm.method import factor_layers
from intraslice.options import RunOptions
from intraslice.placement import Placement, dtype_name, matmul_precision
from intraslice.progress import Progress
from intraslice.results.model_card import render
from intraslice.results.result import RESULT_FILE, LayerRecord, PruneResult
from intraslice.runtime.configuration_intraslice import pruned_config
from intraslice.streaming.hidden import HiddenStates, Streams, embedded_states
from intraslice.streaming.model import StreamedModel


class _Clock:
    """Wall-clock seconds: of this process by phase, and in total with what interrupted runs spent before.

    Args:
        before: seconds of the interrupted runs.
    """

    def __init__(self, before: float) -> None:
        self._started = self._mark = time.monotonic()
        self._before = before
        self.phases: dict[str, float] = {}

    def add(self, seconds: float) -> None:
        """Count work of another run that this one uses as if it had been done in this phase."""
        self._mark -= seconds
        self._before += seconds

    def end_phase(self, name: str) -> None:
        """Give the time since the last phase ended a name."""
        now = time.monotonic()
        self.phases[name] = round(now - self._mark, 3)
        self._mark = now

    def total(self) -> float:
        """Return all seconds so far."""
        return self._before + time.monotonic() - self._started


def prune_checkpoint(
    checkpoint: Checkpoint,
    calibration: Calibration,
    *,
    method: MethodOptions,
    run: RunOptions,
    output: Path,
    overwrite: bool,
    resume: bool,
    method_name: str,
    recipe: dict[str, Any],
    command: str,
    progress: Progress,
) -> PruneResult:
    """Prune a checkpoint and write the smaller one to `output`.

    Work happens in `<output>.partial`; the output folder appears under its name when it is whole. Layers are
    processed in order, and the statistics of a layer come from the outputs of the layers already pruned.

    Args:
        checkpoint: the opened dense checkpoint.
        calibration: token ids [N, T] and where they come from.
        method: what decides the weights.
        run: where and how.
        output: folder to write.
        overwrite: replace an existing output, and drop an interrupted run.
        resume: go on with an interrupted run.
        method_name: name for the record.
        recipe: the full recipe for the record.
        command: the command line for the record.
        progress: shows what is going on.

    Raises:
        IntraSliceError: whatever a user can mend; nothing appears under `output` then.
    """
    check_output(output, overwrite, source=checkpoint.folder)
    placement = Placement.choose(run.device, run.dtype, checkpoint.dtype)
    placement.reset_peak()
    tokens = calibration.tokens
    batch = batch_size(tokens.shape[0], tokens.shape[1], run.batch_tokens)
    identity = {
        "model": checkpoint.fingerprint(),
        "calibration": {
            "name": calibration.source,
            "num_samples": tokens.shape[0],
            "seqlen": tokens.shape[1],
            "seed": calibration.seed,
            "fingerprint": calibration.fingerprint,
        },
        "method": asdict(method),
        "dtype": dtype_name(placement.save_dtype),
        "device": placement.device.type,
        "compute": dtype_name(placement.compute_dtype),
        "matmul": run.matmul,
        "batch_tokens": batch * tokens.shape[1],
    }
    if recipe.get("target_speedup") is not None:
        # Measured again, the same target may give another sparsity; a resumed run keeps the one it began with.
        identity["target_speedup"] = f"{recipe['speedup_of']} {recipe['target_speedup']:g}"
    work = RunDir(output, identity, resume=resume, overwrite=overwrite)
    clock = _Clock(work.seconds)
    if work.records or work.allocation:
        progress.note(f"resuming: {len(work.records)} of {checkpoint.num_layers} layers are finished")
    with work, torch.random.fork_rng(devices=[]):
        torch.manual_seed(calibration.seed)
        model = StreamedModel(checkpoint, placement, (batch, tokens.shape[1]))
        sizes = _block_sizes(model)
        bases = None
        if method.architecture == "block" and work.allocation is None:
            scan_path = work.scan_path
            if run.scan_folder:
                scan_path = kept_scan_path(Path(run.scan_folder), identity, method)
            if reads_gradients(method):
                clock.add(scan_seconds(scan_path))
            with matmul_precision(fast=run.matmul != "exact-gradients"):
                work.allocation = allocate(
                    model,
                    sizes,
                    tokens,
                    method,
                    run,
                    batch=batch,
                    scan_path=scan_path,
                    hidden_path=work.hidden_path,
                    progress=progress,
                )
            work.seconds = clock.total()
            work.save()
        clock.end_phase("allocation")
        with matmul_precision(fast=run.matmul == "fast"):
            if method.architecture == "block":
                _prune_layers(model, sizes, calibration, method, run, batch, work, clock, progress)
            else:
                hidden = _embedded(model, tokens, run, batch, work.hidden_path)
                model.release()
                if method.architecture == "residual" and method.sparsity > 0:
                    bases = slice_layers(model, hidden, method.sparsity, work, clock.total, progress)
                else:  # at sparsity 0 a rotation would only add matrices; no factors are the dense model
                    factor_layers(model, hidden, method.sparsity, work, clock.total, progress)
        clock.end_phase("layers")

    changes: dict[str, Any] = {}
    rest = {name: tensor.to(placement.save_dtype) for name, tensor in checkpoint.load_rest().items()}
    if bases is not None:
        changes, rest = rotate_rest(checkpoint.config, rest, bases)
        if checkpoint.tied:
            progress.note("the output head is rotated otherwise than the embeddings, so they are stored apart")
    config = pruned_config(
        checkpoint.config,
        checkpoint.spec,
        [record.shape for record in work.records],
        method=method_name,
        recipe=recipe,
        changes=changes,
    )
    config.dtype = placement.save_dtype
    written = assemble(
        work.staging,
        [work.layer_path(index) for index in range(checkpoint.num_layers)],
        [checkpoint.layer_prefix(index) for index in range(checkpoint.num_layers)],
        rest,
        run.max_shard_bytes,
    )
    del rest
    save_side_files(work.staging, config, checkpoint.folder)
    dense_layers = sum(sizes.attention) + sum(sizes.ffn)
    kept = sum(record.num_parameters for record in work.records)
    dense_parameters = checkpoint.num_parameters()
    clock.end_phase("write")
    result = PruneResult(
        output=str(output),
        model=checkpoint.name,
        family=checkpoint.spec.name,
        method=method_name,
        requested_sparsity=method.sparsity,
        sparsity=1.0 - kept / dense_layers,
        dense_layer_parameters=dense_layers,
        pruned_layer_parameters=kept,
        dense_parameters=dense_parameters,
        pruned_parameters=_count_parameters(work.staging),
        dense_bytes=dense_parameters * placement.save_dtype.itemsize,
        pruned_bytes=written,
        layers=tuple(work.records),
        seconds={**clock.phases, "total": round(clock.total(), 3)},
        peak_memory_bytes=placement.peak_memory_bytes(),
        calibration=identity["calibration"],
        versions={
            "intraslice": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        device=str(placement.device),
        dtype=dtype_name(placement.save_dtype),
        recipe=recipe,
        command=command,
    )
    write_text(work.staging / RESULT_FILE, result.to_json())
    write_text(work.staging / "README.md", render(result))
    publish(work.staging, output, overwrite)
    work.remove()
    return result


def batch_size(num_sequences: int, seqlen: int, batch_tokens: int) -> int:
    """Return the largest divisor of the number of sequences that fits: all batches then share masks and shapes."""
    wanted = max(1, batch_tokens // seqlen)
    return max(size for size in range(1, num_sequences + 1) if num_sequences % size == 0 and size <= wanted)


def _block_sizes(model: StreamedModel) -> BlockSizes:
    hidden = model.config.hidden_size
    shape = model.dense_shape
    total = model.spec.num_parameters(shape, hidden)
    ffn = shape.intermediate_size * hidden * model.spec.num_ffn_matrices
    return BlockSizes((total - ffn,) * model.num_layers, (ffn,) * model.num_layers)


def _prune_layers(
    model: StreamedModel,
    sizes: BlockSizes,
    calibration: Calibration,
    method: MethodOptions,
    run: RunOptions,
    batch: int,
    work: RunDir,
    clock: _Clock,
    progress: Progress,
) -> None:
    assert work.allocation is not None
    tokens = calibration.tokens
    streams = _open_streams(model, tokens, method, run, batch, work)
    model.release()
    iterated = _layers_to_iterate(work.allocation.ffn, method)
    with progress.step("layers", total=model.num_layers) as advance:
        for index in range(model.num_layers):
            if index < len(work.records):
                _replay(model, index, work, streams)
                advance(1)
                continue
            layer_started = time.monotonic()
            block = model.load_layer(index)
            budget = LayerBudget(
                attention=work.allocation.attention[index] * sizes.attention[index],
                ffn=work.allocation.ffn[index] * sizes.ffn[index] + work.carry,
                iter_pca=index in iterated,
                heads=None if work.allocation.heads is None else work.allocation.heads[index],
                rope_pairs=work.allocation.rope_pairs,
            )
            pruned = prune_layer(model, block, index, streams, budget, method.attention, method.ffn)
            model.placement.synchronize()
            record = LayerRecord(
                layer=index,
                shape=pruned.shape,
                num_parameters=model.spec.num_parameters(pruned.shape, model.config.hidden_size),
                attention_error=pruned.attention_error,
                ffn_error=pruned.ffn_error,
                heads=pruned.heads,
                seconds=round(time.monotonic() - layer_started, 3),
                iter_pca=budget.iter_pca,
            )
            work.commit(record, model.stored_tensors(block), pruned.leftover, clock.total())
            advance(1)
    kept = sum(record.num_parameters for record in work.records)
    reached = 1.0 - kept / (sum(sizes.attention) + sum(sizes.ffn))
    if abs(reached - method.sparsity) > 0.005:
        raise BudgetError(
            f"sparsity {method.sparsity:g} was asked for, but the widths that attention.head_multiple = "
            f"{method.attention.head_multiple} and ffn.ffn_multiple = {method.ffn.ffn_multiple} allow reach only "
            f"{reached:.4f}; lower the multiples or change the sparsity."
        )


def _layers_to_iterate(ffn_fractions: Sequence[float], method: MethodOptions) -> set[int]:
    """Return the layers whose FFN loses the most: the share of layers that iter_pca_fraction names."""
    if not method.ffn.iter_pca:
        return set()
    count = max(1, round(method.ffn.iter_pca_fraction * len(ffn_fractions)))
    return set(sorted(range(len(ffn_fractions)), key=lambda index: (ffn_fractions[index], index))[:count])


def _open_streams(
    model: StreamedModel, tokens: torch.Tensor, method: MethodOptions, run: RunOptions, batch: int, work: RunDir
) -> Streams:
    """Return the hidden states at the input of the first layer."""
    # Where norms come after the blocks there is no plain sum to repair: those layouts use the block's own output.
    against_model = "model" in (method.attention.target, method.ffn.target) and model.norm_first
    return Streams(
        pruned=_embedded(model, tokens, run, batch, work.hidden_path),
        dense=_embedded(model, tokens, run, batch, work.dense_hidden_path) if against_model else None,
    )


def _embedded(model: StreamedModel, tokens: torch.Tensor, run: RunOptions, batch: int, path: Path) -> HiddenStates:
    return embedded_states(model, tokens, batch, path if run.hidden_states == "disk" else None)


def _replay(model: StreamedModel, index: int, work: RunDir, streams: Streams) -> None:
    """Advance the streams through a finished layer."""
    from safetensors.torch import load_file

    block = model.load_pruned_layer(index, work.records[index].shape, load_file(work.layer_path(index)))
    propagate_layer(block, streams.pruned)
    if streams.dense is not None:
        propagate_layer(model.load_layer(index), streams.dense)


def _count_parameters(folder: Path) -> int:
    from intraslice.checkpoint.tensorfile import read_slots

    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        total += sum(
            torch.Size(slot.shape).numel() for slot in read_slots(path).values() if slot.dtype.is_floating_point
        )
    return total
