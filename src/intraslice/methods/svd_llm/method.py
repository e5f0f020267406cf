"""SVD-LLM (arXiv 2403.07378), layer by layer: each weight becomes two factors that fit the inputs it gets.

Shapes: C inputs of a Linear, r rank.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from intraslice.algebra.statistics import SecondMoment
from intraslice.engine.rundir import RunDir
from intraslice.errors import NumericalError
from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.surgery import write_factors
from intraslice.methods.blockwise.layer import propagate_layer
from intraslice.methods.svd_llm.algebra import Ranks, factor_weight, plan_ranks, square_root
from intraslice.progress import Progress
from intraslice.results.result import LayerRecord
from intraslice.streaming.hidden import HiddenStates
from intraslice.streaming.model import StreamedModel


@torch.no_grad()
def factor_layers(
    model: StreamedModel,
    hidden: HiddenStates,
    sparsity: float,
    work: RunDir,
    seconds: Callable[[], float],
    progress: Progress,
) -> None:
    """Replace the weights of all layers by factors, and commit each layer to the work folder.

    Args:
        model: the streamed dense model.
        hidden: inputs of the first layer; overwritten.
        sparsity: fraction of the weights to remove.
        work: where finished layers go; what is there already is not repeated.
        seconds: the time spent so far.
        progress: shows the layers.

    Raises:
        BudgetError: the weights are too small to come close to the budget.
        NumericalError: activations are NaN or infinite.
    """
    from safetensors.torch import load_file

    plan = plan_ranks(model.spec.linear_sizes(model.dense_shape, model.config.hidden_size), model.num_layers, sparsity)
    with progress.step("layers", total=model.num_layers) as advance:
        for index, ranks in enumerate(plan):
            if index < len(work.records):
                shape = work.records[index].shape
                propagate_layer(model.load_pruned_layer(index, shape, load_file(work.layer_path(index))), hidden)
            else:
                started = time.monotonic()
                block = model.load_layer(index)
                attention_error, ffn_error = _factor_layer(model, block, index, ranks, hidden)
                model.placement.synchronize()
                shape = replace(model.dense_shape, ranks=ranks)
                record = LayerRecord(
                    layer=index,
                    shape=shape,
                    num_parameters=model.spec.num_parameters(shape, model.config.hidden_size),
                    attention_error=attention_error,
                    ffn_error=ffn_error,
                    heads=tuple(range(shape.num_attention_heads)),
                    seconds=round(time.monotonic() - started, 3),
                )
                work.commit(record, model.stored_tensors(block), 0.0, seconds())
            advance(1)


def _factor_layer(
    model: StreamedModel, block: DecoderLayer, index: int, ranks: Ranks, hidden: HiddenStates
) -> tuple[float, float]:
    """Factor the weights of the layer in `block`, advance the states through it, return the errors of its blocks."""
    dense = copy.deepcopy(block)

    def context(states: Tensor) -> tuple[Tensor, Tensor]:
        reads = block.attention_input(states)
        return reads, block.context(block.attention, reads)

    def act(states: Tensor) -> tuple[Tensor, Tensor]:
        reads = block.ffn_input(states)
        return reads, block.act(reads)

    try:
        _factor_weights(model, block, model.spec.attention_paths, ranks, hidden, context)
        attention_error = _advance(
            hidden,
            lambda states: dense.attention_output(dense.attention, states),
            lambda states: block.attention_output(block.attention, states),
            block.add_attention,
        )
        _factor_weights(model, block, model.spec.ffn_paths, ranks, hidden, act)
        ffn_error = _advance(hidden, dense.ffn_output, block.ffn_output, block.add_ffn)
    except NumericalError as error:
        raise NumericalError(f"layer {index}: {error}") from error
    return attention_error, ffn_error


def _factor_weights(
    model: StreamedModel,
    block: DecoderLayer,
    paths: tuple[Sequence[str], str],
    ranks: Ranks,
    hidden: HiddenStates,
    inputs: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Factor the Linears of one block, `paths`: those that read its input, and the one that writes its output.

    `inputs` gives what the two read, of the hidden states before the block.
    """
    reading, writing = paths
    by_input = ((reading, model.config.hidden_size), ((writing,), _linear(block, writing).in_features))
    moments = [SecondMoment(width, None, model.placement.device, model.placement.stat_dtype) for _, width in by_input]
    for part in hidden.slices():
        for moment, values in zip(moments, inputs(hidden.read(part)), strict=True):
            moment.update(values.flatten(0, 1))
    wanted = dict(ranks)
    for (found, _), moment in zip(by_input, moments, strict=True):
        if not torch.isfinite(moment.value).all():
            raise NumericalError("the activations contain NaN or infinite values.")
        root = square_root(moment.value)
        for path in found:
            if path in wanted:
                weight = _linear(block, path).weight.detach().to("cpu", root.dtype)
                first, second = factor_weight(weight, root, wanted[path])
                write_factors(block, path, first, second, model.placement.save_dtype)


def _linear(block: DecoderLayer, path: str) -> nn.Linear:
    linear = block.module.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def _advance(
    hidden: HiddenStates,
    dense: Callable[[Tensor], Tensor],
    factored: Callable[[Tensor], Tensor],
    add: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """Advance the states through a factored block; return its relative squared error against the dense one."""
    error = energy = 0.0
    for part in hidden.slices():
        states = hidden.read(part)
        wanted, output = dense(states), factored(states)
        error += float((wanted - output).float().square().sum(dtype=torch.float64))
        energy += float(wanted.float().square().sum(dtype=torch.float64))
        hidden.write(part, add(states, output))
    return error / max(energy, 1e-300)
