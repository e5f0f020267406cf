"""The gradient of the loss on its way down through a model of which one layer is in memory.

A chunk of sequences runs forward through all layers, keeping only the states at the layer boundaries; then each layer
is loaded again, last to first, and handed to whoever takes the gradient through it.

Shapes: S sequences, B sequences of a batch, T tokens, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from intraslice.layers.decoder import DecoderLayer
from intraslice.streaming.boundaries import boundary_states_bytes, chunk_size
from intraslice.streaming.model import StreamedModel

BackwardStep = Callable[[int, DecoderLayer, Tensor, Tensor], Tensor]
"""(index, layer, its input [B, T, D], gradient at its output [B, T, D]) -> gradient at its input, [B, T, D]."""

Forward = Callable[[int, DecoderLayer, Sequence[Tensor]], Iterable[Tensor]]
"""(index, layer, its input for each batch, [B, T, D]) -> its output for each of them, as soon as it is there."""

LossGradient = Callable[[Tensor, Tensor], Tensor]
"""(token ids [B, T], output of the last layer [B, T, D]) -> gradient of a loss at that output, [B, T, D]."""


def backward_pass(
    model: StreamedModel,
    tokens_ST: Tensor,
    step: BackwardStep,
    *,
    boundary_bytes: int,
    advance: Callable[[int], None],
    load: Callable[[int], DecoderLayer] | None = None,
    gradient: LossGradient | None = None,
) -> None:
    """Take the gradient of a loss, a sum over the sequences, through all layers, batch by batch.

    Args:
        model: the streamed model.
        tokens_ST: calibration token ids, [S, T].
        step: takes the gradient of a batch through a layer, and what it wants on the way.
        boundary_bytes: memory for the states at the layer boundaries of one chunk.
        advance: is told the sequences that went through a layer, `passes` in all.
        load: returns the layers; those of the model, one in memory, unless it is given.
        gradient: of the loss; that of the mean loss of a token of each sequence unless it is given.

    Raises:
        NumericalError: the loss is NaN or infinite.
    """
    num_sequences, seqlen = tokens_ST.shape
    chunk = sequences_of_chunk(model, seqlen, boundary_bytes)
    for start in range(0, num_sequences, chunk):
        tokens = tokens_ST[start : start + chunk]
        backward_chunk(model, tokens, step, advance=advance, load=load, gradient=gradient)


def sequences_of_chunk(model: StreamedModel, seqlen: int, boundary_bytes: int) -> int:
    """Return how many sequences of T tokens go up and down together, in whole batches."""
    itemsize = model.placement.compute_dtype.itemsize
    states_bytes = boundary_states_bytes(model.num_layers, seqlen, model.config.hidden_size, itemsize)
    return chunk_size(boundary_bytes, states_bytes, model.batch_shape[0])


def backward_chunk(
    model: StreamedModel,
    tokens_ST: Tensor,
    step: BackwardStep,
    *,
    advance: Callable[[int], None],
    load: Callable[[int], DecoderLayer] | None = None,
    forward: Forward | None = None,
    gradient: LossGradient | None = None,
) -> None:
    """Take some sequences up through all layers, and the gradient of their loss down again.

    Args:
        model: the streamed model.
        tokens_ST: token ids of the chunk, [S, T].
        step: as for `backward_pass`; is called with the batches of a layer in their order.
        advance: as for `backward_pass`.
        load: as for `backward_pass`.
        forward: runs a layer on the way up and measures what it wants; the layer alone unless it is given.
        gradient: as for `backward_pass`.

    Raises:
        NumericalError: the loss is NaN or infinite.
    """
    load, forward = load or model.load_layer, forward or _outputs
    gradient = gradient or (lambda tokens, top: model.loss_gradient(tokens, top)[1])
    parts = tokens_ST.split(model.batch_shape[0])
    # boundaries[b][l]: input of layer l for batch b; the last entry is the output of the last layer.
    boundaries = [[model.embed(part)] for part in parts]
    for index in range(model.num_layers):
        outputs = forward(index, load(index), [states[-1] for states in boundaries])
        for part, states, output in zip(parts, boundaries, outputs, strict=True):
            states.append(output)
            advance(len(part))
    gradients = [gradient(part, states.pop()) for part, states in zip(parts, boundaries, strict=True)]
    for index in reversed(range(model.num_layers)):
        layer = load(index)
        for number, part in enumerate(parts):
            gradients[number] = step(index, layer, boundaries[number].pop(), gradients[number])
            advance(len(part))


def _outputs(index: int, layer: DecoderLayer, inputs: Sequence[Tensor]) -> Iterable[Tensor]:
    for hidden in inputs:
        # Not around the yield: whoever takes the outputs would run without gradients as well.
        with torch.no_grad():
            output = layer.output(hidden)
        yield output


def passes(model: StreamedModel, tokens_ST: Tensor) -> int:
    """Return how often a sequence goes through a layer in a backward pass, up or down."""
    return 2 * model.num_layers * len(tokens_ST)
