"""The gradient of the loss on its way down through a model of which one layer is in memory.

A chunk of sequences runs forward through all layers, keeping only the states at the layer boundaries; then each layer
is loaded again, last to first, and handed to whoever takes the gradient through it.

Shapes: S sequences, B sequences of a batch, T tokens, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from intraslice.layers.decoder import DecoderLayer
from intraslice.streaming.boundaries import boundary_states_bytes, chunk_size
from intraslice.streaming.model import StreamedModel

BackwardStep = Callable[[int, DecoderLayer, Tensor, Tensor], Tensor]
"""(index, layer, its input [B, T, D], gradient at its output [B, T, D]) -> gradient at its input, [B, T, D]."""

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
    load = load or model.load_layer
    gradient = gradient or (lambda tokens, top: model.loss_gradient(tokens, top)[1])
    num_sequences, seqlen = tokens_ST.shape
    layers, batch = model.num_layers, model.batch_shape[0]
    itemsize = model.placement.compute_dtype.itemsize
    states_bytes = boundary_states_bytes(layers, seqlen, model.config.hidden_size, itemsize)
    chunk = chunk_size(boundary_bytes, states_bytes, batch)
    for start in range(0, num_sequences, chunk):
        stop = min(start + chunk, num_sequences)
        parts = [tokens_ST[first : min(first + batch, stop)] for first in range(start, stop, batch)]
        boundaries = [[model.embed(part)] for part in parts]
        for index in range(layers):
            layer = load(index)
            for part, states in zip(parts, boundaries, strict=True):
                with torch.no_grad():
                    states.append(layer.output(states[-1]))
                advance(len(part))
        pairs = zip(parts, boundaries, strict=True)
        gradients = [gradient(part, states.pop()) for part, states in pairs]
        for index in reversed(range(layers)):
            layer = load(index)
            for number, part in enumerate(parts):
                gradients[number] = step(index, layer, boundaries[number].pop(), gradients[number])
                advance(len(part))


def passes(model: StreamedModel, tokens_ST: Tensor) -> int:
    """Return how often a sequence goes through a layer in a backward pass, up or down."""
    return 2 * model.num_layers * len(tokens_ST)
