"""SliceGPT (arXiv 2401.15024), layer by layer: the residual stream is rotated and its last directions are deleted.

A stream stored as x B (B the basis at that place) is the stream x B B^T of the dense model. So the dense layers run
here on projected states, each once, and the rotations go into the weights at the end.

Shapes: D hidden_size of the dense model, d width of the sliced stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from intraslice.algebra.statistics import SecondMoment
from intraslice.checkpoint.reader import OUTPUT_EMBEDDING
from intraslice.engine.rundir import RunDir
from intraslice.errors import NumericalError
from intraslice.methods.slicegpt.algebra import leading_directions, rotate_layer, rotate_rows, slice_width
from intraslice.progress import Progress
from intraslice.results.result import LayerRecord
from intraslice.runtime.configuration_intraslice import dense_head_dim
from intraslice.streaming.hidden import HiddenStates
from intraslice.streaming.model import StreamedModel

# The families with RMSNorm share these names.
_EMBEDDING, _FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"


@torch.no_grad()
def slice_layers(
    model: StreamedModel,
    hidden: HiddenStates,
    sparsity: float,
    work: RunDir,
    seconds: Callable[[], float],
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Rotate and slice all layers, and commit each to the work folder.

    Args:
        model: the streamed dense model.
        hidden: inputs of the first layer; overwritten.
        sparsity: fraction of the weights to remove, the matrices on the residual connections counted.
        work: where finished layers go. The stream after a layer cannot be had from its stored tensors, so an
            interrupted run starts again.
        seconds: the time spent so far.
        progress: shows the layers.

    Returns:
        Directions of the stream before the first and after the last layer, [D, d].

    Raises:
        BudgetError: the stream is too narrow to come close to the budget.
        NumericalError: activations are NaN or infinite.
    """
    if work.records:
        progress.note("the residual stream is rotated from the first layer on: the finished layers are made again")
        work.records.clear()
    hidden_size = model.config.hidden_size
    per_channel = model.spec.num_parameters(model.dense_shape, hidden_size) // hidden_size
    width = slice_width(per_channel, hidden_size, sparsity)
    shape = replace(model.dense_shape, shortcuts=True)
    first, _ = _advance(model, hidden, width, lambda states: states)
    before = first
    with progress.step("layers", total=model.num_layers) as advance:
        for index in range(model.num_layers):
            started = time.monotonic()
            block = model.load_layer(index)
            try:
                middle, attention_error = _advance(model, hidden, width, block.attention_step, before)
                after, ffn_error = _advance(model, hidden, width, block.ffn_step, middle)
            except NumericalError as error:
                raise NumericalError(f"layer {index}: {error}") from error
            record = LayerRecord(
                layer=index,
                shape=shape,
                num_parameters=model.spec.num_parameters(shape, width),
                attention_error=attention_error,
                ffn_error=ffn_error,
                heads=tuple(range(shape.num_attention_heads)),
                seconds=round(time.monotonic() - started, 3),
            )
            tensors = rotate_layer(model.stored_tensors(block), model.spec, (before, middle, after))
            work.commit(record, tensors, 0.0, seconds())
            before = after
            advance(1)
    return first, before


def _advance(
    model: StreamedModel,
    hidden: HiddenStates,
    width: int,
    step: Callable[[Tensor], Tensor],
    basis_Dd: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Run half a layer on the states, projected on their basis, and overwrite them with what comes out.

    Returns:
        The leading directions of the new states, and the share of their energy that is deleted. As in the published
        code, tokens count by their norm; states normed first, as in the paper, gave the higher perplexity.
    """
    device, dtype = model.placement.device, model.placement.compute_dtype
    basis = None if basis_Dd is None else basis_Dd.to(device, dtype)
    moment = SecondMoment(model.config.hidden_size, None, device, model.placement.stat_dtype)
    for part in hidden.slices():
        states = hidden.read(part)
        states = step(states if basis is None else states @ basis @ basis.T)
        hidden.write(part, states)
        moment.update(states.flatten(0, 1))
    return leading_directions(moment.value, width)


def rotate_rest(
    config: Any, rest: dict[str, Tensor], bases: tuple[Tensor, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what the sliced stream changes outside of the decoder layers.

    Args:
        config: of the dense model.
        rest: tensors outside of the decoder layers, by full name; a tied head is left out.
        bases: directions of the stream before the first and after the last layer.

    Returns:
        Fields of the config, and all tensors of the sliced model; its head is its own.
    """
    first, last = bases
    hidden_size, width = first.shape
    changes = {
        "hidden_size": width,
        "head_dim": dense_head_dim(config),
        # The sliced norm takes the mean over fewer channels.
        "rms_norm_eps": config.rms_norm_eps * hidden_size / width,
        "tie_word_embeddings": False,
    }
    norm = rest[_FINAL_NORM]
    head = rest.get(OUTPUT_EMBEDDING, rest[_EMBEDDING])
    return changes, {
        **rest,
        _EMBEDDING: rotate_rows(rest[_EMBEDDING], first),
        _FINAL_NORM: torch.ones(width, dtype=norm.dtype),
        OUTPUT_EMBEDDING: rotate_rows(head, last, norm),
    }
