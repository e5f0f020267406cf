"""Measures the sites of one decoder layer: from hidden states to the sums that scores and repairs read.

Shapes: B sequences of a batch, T tokens, N = B * T, D hidden_size, H query heads, K kv heads, d head_dim,
F intermediate_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intraslice.algebra.statistics import Statistics
from intraslice.errors import NumericalError
from intraslice.layers.decoder import DecoderLayer, read_ffn
from intraslice.methods.blockwise.channels import own_output
from intraslice.methods.blockwise.heads import AttentionStats
from intraslice.methods.blockwise.repairs import OutputMoments
from intraslice.runtime.modeling_intraslice import PrunedAttention
from intraslice.streaming.hidden import HiddenStates, Streams
from intraslice.streaming.model import StreamedModel


def attention_stats(
    model: StreamedModel, layer: DecoderLayer, hidden: HiddenStates, full_moment: bool
) -> AttentionStats:
    """Measure the attention of a dense layer.

    Args:
        model: the streamed model the layer belongs to.
        layer: the layer at its dense shape.
        hidden: inputs of the layer.
        full_moment: whether the second moment over all heads is wanted.

    Raises:
        NumericalError: activations are NaN or infinite.
    """
    attention = layer.attention
    shape, dtype = attention.shape, model.placement.stat_dtype
    num_heads, num_kv = shape.num_attention_heads, shape.num_key_value_heads
    qk, v = shape.qk_head_dim, shape.v_head_dim
    stats = Statistics(model.placement.device, dtype)
    context_moment = stats.block_second_moment("context", num_heads, v)
    context_full = stats.second_moment("context_full", num_heads * v) if full_moment else None
    context_sum = stats.sum("context_sum", num_heads * v)
    value_energy = stats.sum("value_energy", num_kv, v)
    query_moment = stats.block_second_moment("query", num_heads, qk)
    key_moment = stats.block_second_moment("key", num_kv, qk)
    key_sum, key_abs = stats.sum("key_sum", num_kv, qk), stats.sum("key_abs", num_kv, qk)
    query_abs = stats.sum("query_abs", num_heads, qk)
    num_tokens = stats.number("num_tokens")
    for part in hidden.slices():
        states = hidden.read(part)
        query, key, value = layer.project(attention, layer.attention_input(states))
        context = layer.attend(attention, query, key, value)
        context_moment.update(context.flatten(0, 1))
        if context_full is not None:
            context_full.update(context.flatten(0, 1))
        context_sum.update(context.sum((0, 1), dtype=dtype))
        value_energy.update(value.to(dtype).square().sum((0, 2)))
        query_abs.update(query.abs().sum((0, 2)))
        key_abs.update(key.abs().sum((0, 2)))
        if not attention.rotated:
            key_sum.update(key.sum((0, 2)))
            query_moment.update(query.transpose(1, 2).flatten(0, 1).flatten(1))
            key_moment.update(key.transpose(1, 2).flatten(0, 1).flatten(1))
        num_tokens.update(context.shape[0] * context.shape[1])
    sums = stats.finish()
    if not torch.isfinite(sums["context"]).all() or not torch.isfinite(sums["query_abs"]).all():
        raise NumericalError("the attention activations contain NaN or infinite values.")
    return AttentionStats(
        **{"context_full": None, **sums, "num_tokens": int(sums["num_tokens"])}  # type: ignore[arg-type]
    )


def context_moments(
    model: StreamedModel,
    layer: DecoderLayer,
    streams: Streams,
    dense: PrunedAttention,
    repair_against: str,
) -> OutputMoments:
    """Measure the context of the trial attention in `layer` against its target, and advance the dense stream.

    The target is what the site should add to the pruned stream x: the dense site's output on x itself, or what leads
    from x to the dense model's stream, (h + dense output on h) - x. The dense bias stays in the projection, so the
    target is taken without it.
    """
    sums = _OutputSums(model, layer.out_projection.in_features)
    for part in streams.pruned.slices():
        states = streams.pruned.read(part)
        target = None
        if streams.dense is not None:
            dense_states = streams.dense.read(part)
            output = layer.attention_output(dense, dense_states)
            target = dense_states + output - states
            streams.dense.write(part, layer.add_attention(dense_states, output))
        if target is None or repair_against == "own_output":
            target = layer.attention_output(dense, states)
        target = without_bias(target, layer.out_projection).flatten(0, 1)
        context = layer.context(layer.attention, layer.attention_input(states)).flatten(0, 1)
        sums.update(context, target)
    return sums.moments()


def ffn_moments(model: StreamedModel, layer: DecoderLayer, streams: Streams, repair_against: str) -> OutputMoments:
    """Advance the pruned stream through attention and the dense stream through the FFN; measure the dense FFN.

    Raises:
        NumericalError: activations are NaN or infinite.
    """
    sums = _OutputSums(model, layer.down_projection.in_features)
    to_stream = repair_against == "dense_stream" and streams.dense is not None
    for part in streams.pruned.slices():
        states = layer.attention_step(streams.pruned.read(part))
        streams.pruned.write(part, states)
        act = layer.act(layer.ffn_input(states)).flatten(0, 1)
        target = None
        if streams.dense is not None:
            dense_states = streams.dense.read(part)
            output = layer.ffn_output(dense_states)
            if to_stream:
                target = without_bias(dense_states + output - states, layer.down_projection).flatten(0, 1)
            streams.dense.write(part, layer.add_ffn(dense_states, output))
        sums.update(act, target)
    moments = sums.moments()
    if not torch.isfinite(moments.gram).all():
        raise NumericalError("the FFN activations contain NaN or infinite values.")
    return moments if to_stream else own_output(moments, read_ffn(layer, layer.shape).down)


class _OutputSums:
    """Adds up `OutputMoments` batch by batch.

    Args:
        model: the streamed model.
        width: inputs of the output projection.
    """

    def __init__(self, model: StreamedModel, width: int) -> None:
        outputs = model.config.hidden_size
        self._dtype = model.placement.stat_dtype
        self._statistics = Statistics(model.placement.device, self._dtype)
        self._gram = self._statistics.second_moment("gram", width)
        self._cross = self._statistics.second_moment("cross", width, outputs)
        self._input_sum = self._statistics.sum("input_sum", width)
        self._target_sum = self._statistics.sum("target_sum", outputs)
        self._energy = self._statistics.number("target_energy")
        self._num_tokens = self._statistics.number("num_tokens")

    def update(self, inputs_NP: Tensor, targets_ND: Tensor | None) -> None:
        """Add a batch; without targets only what the inputs decide."""
        self._gram.update(inputs_NP)
        self._input_sum.update(inputs_NP.sum(0, dtype=self._dtype))
        self._num_tokens.update(inputs_NP.shape[0])
        if targets_ND is not None:
            self._cross.update(inputs_NP, targets_ND)
            self._target_sum.update(targets_ND.sum(0, dtype=self._dtype))
            self._energy.update(float(targets_ND.float().square().sum(dtype=torch.float64)))

    def moments(self) -> OutputMoments:
        """Return the sums in float64."""
        sums = self._statistics.finish()
        return OutputMoments(
            gram=sums["gram"],
            cross=sums["cross"],
            input_sum=sums["input_sum"],
            target_sum=sums["target_sum"],
            target_energy=float(sums["target_energy"]),
            num_tokens=int(sums["num_tokens"]),
        )


def without_bias(output_BTD: Tensor, linear: torch.nn.Linear) -> Tensor:
    """Return an output as it would be without the bias of its projection."""
    return output_BTD if linear.bias is None else output_BTD - linear.bias
