"""SliceGPT (arXiv 2401.15024), layer by layer: the residual stream is rotated and its last directions are deleted.

A stream stored as x B (B the basis at that place) is the stream x B B^T of the dense model. So the dense layers run
here on projected states, each once, and the rotations go into the weights at the end.

Shapes: D hidden_size of the dense model, d width of the sliced stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from intraslice.algebra.statistics import SecondMoment
from intraslice.checkpoint.reader import OUTPUT_EMBEDDING
from intraslice.errors import NumericalError
from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.sites import ATTENTION, FFN
from intraslice.methods.base import Context, FinishedLayers, LayerOutcome, Outside, Preview
from intraslice.methods.slicegpt.algebra import leading_directions, rotate_layer, rotate_rows, slice_width
from intraslice.methods.slicegpt.options import SliceGptOptions
from intraslice.runtime.configuration_intraslice import dense_head_dim
from intraslice.streaming.hidden import HiddenStates
from intraslice.streaming.model import StreamedModel

# The families with RMSNorm share this name.
_EMBEDDING = "model.embed_tokens.weight"


@dataclass
class _State:
    """The stream, and its directions before the first layer and after the last finished one, [D, d].

    Without directions nothing is sliced there: at sparsity 0, and behind the last layer.
    """

    hidden: HiddenStates
    first: Tensor | None = None
    last: Tensor | None = None


class SliceGpt:
    """The residual stream of all layers on its leading directions.

    Args:
        options: none.
    """

    # The stream after a layer cannot be had from its stored tensors.
    resumes = False

    def __init__(self, options: SliceGptOptions) -> None:
        self._options = options
        self._width = 0

    def preview(self, dense: Any, sparsity: float) -> Preview:
        """Count embeddings and an output head of its own, and the norms."""
        if sparsity == 0:
            return Preview()
        layers, hidden_size = len(dense.layers), dense.hidden_size
        per_channel = dense.dense_layer_parameters // layers // hidden_size
        width = slice_width(layers, per_channel, dense.layers[-1].shape.intermediate_size, hidden_size, sparsity)
        # Embeddings and the norms of the layers are sliced, the final norm and the head are not.
        sliced = (dense.vocab_size + 2 * layers) * width
        return Preview(outside_parameters=sliced + (dense.vocab_size + 1) * hidden_size)

    def plan(self, context: Context) -> dict[str, Any]:
        """Return the width of the stream; at sparsity 0 it stays what it is, and nothing is rotated.

        Raises:
            BudgetError: the stream is too narrow to come close to the budget.
        """
        model, hidden_size = context.model, context.model.config.hidden_size
        if context.sparsity == 0:
            # A rotation would only add the matrices on the residual connections.
            return {"width": hidden_size}
        total = sum(model.spec.num_parameters(shape, hidden_size) for shape in model.dense_shapes)
        per_channel, width = total // model.num_layers // hidden_size, model.dense_shapes[-1].intermediate_size
        return {"width": slice_width(model.num_layers, per_channel, width, hidden_size, context.sparsity)}

    def plan_seconds(self, context: Context) -> float:
        """Return 0: nothing is measured."""
        return 0.0

    @torch.no_grad()
    def open(self, context: Context, plan: dict[str, Any], carry: Any) -> _State:
        """Return the stream at the input of the first layer, with its directions."""
        self._width = plan["width"]
        state = _State(context.embedded())
        if context.sparsity > 0:
            state.first, _ = _advance(context.model, state.hidden, self._width, lambda states: states)
            state.last = state.first
        return state

    @torch.no_grad()
    def layer(self, context: Context, state: _State, index: int, layer: DecoderLayer) -> LayerOutcome:
        """Rotate and slice the stored tensors of the layer, and advance the stream through it."""
        model, width = context.model, self._width
        last = index == model.num_layers - 1
        shape = replace(model.dense_shapes[index], shortcuts=context.sparsity > 0)
        if shape.shortcuts and last:
            shape = replace(shape, output_size=model.config.hidden_size)
        outcome = {
            "shape": shape,
            "num_weights": model.spec.num_parameters(shape, width),
            "heads": tuple(range(shape.num_attention_heads)),
        }
        if state.last is None:
            return LayerOutcome(errors={ATTENTION: 0.0, FFN: 0.0}, **outcome)
        before = state.last
        try:
            middle, attention_error = _advance(model, state.hidden, width, layer.attention_step, before)
            assert middle is not None
            # As in the published code, nothing is sliced behind the last layer: the head reads the whole stream.
            kept = None if last else width
            after, ffn_error = _advance(model, state.hidden, kept, layer.ffn_step, middle)
        except NumericalError as error:
            raise NumericalError(f"layer {index}: {error}") from error
        state.last = after
        tensors = rotate_layer(model.stored_tensors(layer), model.spec, (before, middle, after))
        return LayerOutcome(errors={ATTENTION: attention_error, FFN: ffn_error}, tensors=tensors, **outcome)

    def replay(self, context: Context, state: _State, index: int, layer: DecoderLayer) -> None:
        """Not called: finished layers are made again."""
        raise AssertionError("the stream after a layer cannot be had from its stored tensors")

    def tune(self, context: Context, layers: FinishedLayers) -> None:
        """Train nothing: the method is its closed form."""

    def finish(self, context: Context, state: _State, outside: dict[str, Tensor]) -> Outside:
        """Return the embeddings of the sliced stream; final norm and output head are those of the dense model."""
        if state.first is None:
            return Outside(tensors=outside)
        if context.model.checkpoint.tied:
            context.progress.note("the embeddings are sliced and the output head is not, so they are stored apart")
        changes, tensors = rotate_rest(context.model.config, outside, state.first)
        return Outside(tensors=tensors, config=changes)


def _advance(
    model: StreamedModel,
    hidden: HiddenStates,
    width: int | None,
    step: Callable[[Tensor], Tensor],
    basis_Dd: Tensor | None = None,
) -> tuple[Tensor | None, float]:
    """Run half a layer on the states, projected on their basis, and overwrite them with what comes out.

    Args:
        model: the dense model.
        hidden: the states; overwritten.
        width: directions to keep of what comes out; None keeps all of it as it is.
        step: half a layer.
        basis_Dd: of the states; None leaves them as they are.

    Returns:
        The leading directions of the new states, and the share of their energy that is deleted. As in the published
        code, tokens count by their norm; states normed first, as in the paper, gave the higher perplexity.
    """
    device, dtype = model.placement.device, model.placement.compute_dtype
    basis = None if basis_Dd is None else basis_Dd.to(device, dtype)
    moment = SecondMoment(model.config.hidden_size, None, model.placement.stat_device, model.placement.stat_dtype)
    for part in hidden.slices():
        states = hidden.read(part)
        states = step(states if basis is None else states @ basis @ basis.T)
        hidden.write(part, states)
        moment.update(states.flatten(0, 1))
    directions, lost = leading_directions(moment.value, width or model.config.hidden_size)
    return (directions, lost) if width else (None, 0.0)


def rotate_rest(config: Any, rest: dict[str, Tensor], first: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what the sliced stream changes outside of the decoder layers.

    Args:
        config: of the dense model.
        rest: tensors outside of the decoder layers, by full name; a tied head is left out.
        first: directions of the stream before the first layer, [D, d].

    Returns:
        Fields of the config, and all tensors of the sliced model; its head is its own.
    """
    hidden_size, width = first.shape
    changes = {
        "hidden_size": width,
        "head_dim": dense_head_dim(config),
        # The sliced norm takes the mean over fewer channels.
        "rms_norm_eps": config.rms_norm_eps * hidden_size / width,
        "tie_word_embeddings": False,
    }
    head = rest.get(OUTPUT_EMBEDDING, rest[_EMBEDDING])
    return changes, {**rest, _EMBEDDING: rotate_rows(rest[_EMBEDDING], first), OUTPUT_EMBEDDING: head}
