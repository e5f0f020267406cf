"""Measures the blocks of one decoder layer: from hidden states to the sums that the compressors read.

Shapes: B sequences of a batch, T tokens, N = B * T, D hidden_size, H query heads, K kv heads, d head_dim,
F intermediate_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intraslice.algebra.statistics import BlockSecondMoment, SecondMoment, Sum
from intraslice.errors import NumericalError
from intraslice.layers.decoder import DecoderLayer, read_ffn
from intraslice.methods.blockwise.channels import block_target
from intraslice.methods.blockwise.heads import AttentionStats
from intraslice.methods.blockwise.options import FFNOptions
from intraslice.methods.blockwise.repairs import OutputMoments
from intraslice.runtime.modeling_intraslice import PrunedAttention
from intraslice.streaming.hidden import HiddenStates, Streams
from intraslice.streaming.model import StreamedModel


def attention_stats(model: StreamedModel, block: DecoderLayer, hidden: HiddenStates, all_heads: bool) -> AttentionStats:
    """Measure the attention of a dense layer.

    Args:
        model: the streamed model the layer belongs to.
        block: the layer at its dense shape.
        hidden: inputs of the layer.
        all_heads: whether the second moment over all heads is wanted.

    Raises:
        NumericalError: activations are NaN or infinite.
    """
    shape = model.dense_shape
    device, dtype = model.placement.device, model.placement.stat_dtype
    num_heads, num_kv = shape.num_attention_heads, shape.num_key_value_heads
    qk, v = shape.qk_head_dim, shape.v_head_dim
    context_moment = BlockSecondMoment(num_heads, v, device, dtype)
    full_moment = SecondMoment(num_heads * v, None, device, dtype) if all_heads else None
    context_sum = Sum(num_heads * v, device=device, dtype=dtype)
    value_energy = Sum(num_kv, v, device=device, dtype=dtype)
    query_moment = BlockSecondMoment(num_heads, qk, device, dtype)
    key_moment = BlockSecondMoment(num_kv, qk, device, dtype)
    key_sum, key_abs = (Sum(num_kv, qk, device=device, dtype=dtype) for _ in range(2))
    query_abs = Sum(num_heads, qk, device=device, dtype=dtype)
    num_tokens = 0
    for part in hidden.slices():
        states = hidden.read(part)
        query, key, value = block.project(block.attention, block.attention_input(states))
        context = block.attend(block.attention, query, key, value)
        context_moment.update(context.flatten(0, 1))
        if full_moment is not None:
            full_moment.update(context.flatten(0, 1))
        context_sum.update(context.sum((0, 1), dtype=dtype))
        value_energy.update(value.to(dtype).square().sum((0, 2)))
        query_abs.update(query.abs().sum((0, 2)))
        key_abs.update(key.abs().sum((0, 2)))
        if not model.spec.rope:
            key_sum.update(key.sum((0, 2)))
            query_moment.update(query.transpose(1, 2).flatten(0, 1).flatten(1))
            key_moment.update(key.transpose(1, 2).flatten(0, 1).flatten(1))
        num_tokens += context.shape[0] * context.shape[1]
    stats = AttentionStats(
        context=context_moment.value,
        context_sum=context_sum.value,
        context_full=None if full_moment is None else full_moment.value,
        value_energy=value_energy.value,
        query=query_moment.value,
        key=key_moment.value,
        key_sum=key_sum.value,
        query_abs=query_abs.value,
        key_abs=key_abs.value,
        num_tokens=num_tokens,
    )
    if not torch.isfinite(stats.context).all() or not torch.isfinite(stats.query_abs).all():
        raise NumericalError("the attention activations contain NaN or infinite values.")
    return stats


def context_moments(
    model: StreamedModel,
    block: DecoderLayer,
    streams: Streams,
    dense: PrunedAttention,
    target: str,
) -> OutputMoments:
    """Measure the context of the trial attention in `block` against its target, and advance the dense stream.

    The target is what the block should add to the pruned stream x: the dense block's output on x itself, or what
    leads from x to the dense model's stream, (h + dense output on h) - x. Biases cancel or are kept as they are, so
    both are taken without the output bias.
    """
    sums = _OutputSums(model, block.out_projection.in_features)
    for part in streams.pruned.slices():
        states = streams.pruned.read(part)
        wanted = None
        if streams.dense is not None:
            dense_states = streams.dense.read(part)
            output = block.attention_output(dense, dense_states)
            wanted = dense_states + output - states
            streams.dense.write(part, block.add_attention(dense_states, output))
        if wanted is None or target == "block":
            wanted = block.attention_output(dense, states)
        wanted = without_bias(wanted, block.out_projection).flatten(0, 1)  # the trial keeps the dense bias
        context = block.context(block.attention, block.attention_input(states)).flatten(0, 1)
        sums.update(context, wanted)
    return sums.moments()


def ffn_moments(model: StreamedModel, block: DecoderLayer, streams: Streams, options: FFNOptions) -> OutputMoments:
    """Advance the pruned stream through attention and the dense stream through the FFN; measure the dense FFN.

    Raises:
        NumericalError: activations are NaN or infinite.
    """
    sums = _OutputSums(model, model.dense_shape.intermediate_size)
    to_model = options.target == "model" and streams.dense is not None
    for part in streams.pruned.slices():
        states = block.attention_step(streams.pruned.read(part))
        streams.pruned.write(part, states)
        act = block.act(block.ffn_input(states)).flatten(0, 1)
        wanted = None
        if streams.dense is not None:
            dense_states = streams.dense.read(part)
            output = block.ffn_output(dense_states)
            if to_model:
                wanted = without_bias(dense_states + output - states, block.down_projection).flatten(0, 1)
            streams.dense.write(part, block.add_ffn(dense_states, output))
        sums.update(act, wanted)
    moments = sums.moments()
    if not torch.isfinite(moments.gram).all():
        raise NumericalError("the FFN activations contain NaN or infinite values.")
    return moments if to_model else block_target(moments, read_ffn(block, block.attention.shape).down)


class _OutputSums:
    """Adds up `OutputMoments` batch by batch.

    Args:
        model: the streamed model.
        width: inputs of the output projection.
    """

    def __init__(self, model: StreamedModel, width: int) -> None:
        self._device, self._dtype = model.placement.device, model.placement.stat_dtype
        self._outputs = model.config.hidden_size
        self._gram = SecondMoment(width, None, self._device, self._dtype)
        self._cross = SecondMoment(width, self._outputs, self._device, self._dtype)
        self._input_sum = Sum(width, device=self._device, dtype=self._dtype)
        self._target_sum = Sum(self._outputs, device=self._device, dtype=self._dtype)
        self._energy = 0.0

    def update(self, inputs_NP: Tensor, targets_ND: Tensor | None) -> None:
        """Add a batch; without targets only what the inputs decide."""
        self._gram.update(inputs_NP)
        self._input_sum.update(inputs_NP.sum(0, dtype=self._dtype))
        if targets_ND is not None:
            self._cross.update(inputs_NP, targets_ND)
            self._target_sum.update(targets_ND.sum(0, dtype=self._dtype))
            self._energy += float(targets_ND.float().square().sum(dtype=torch.float64))

    def moments(self) -> OutputMoments:
        """Return the sums in float64."""
        return OutputMoments(
            gram=self._gram.value,
            cross=self._cross.value,
            input_sum=self._input_sum.value,
            target_sum=self._target_sum.value,
            target_energy=self._energy,
            num_tokens=self._gram.num_tokens,
        )


def without_bias(output_BTD: Tensor, linear: torch.nn.Linear) -> Tensor:
    """Return an output as it would be without the bias of its projection."""
    return output_BTD if linear.bias is None else output_BTD - linear.bias
