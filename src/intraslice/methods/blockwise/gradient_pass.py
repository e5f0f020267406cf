"""The gradient pass: mask gradients of every channel, one backward per sequence, one layer in memory.

A chunk of sequences runs forward through all layers, keeping only the states at the layer boundaries; then each
layer is loaded again, last to first, and recomputed with autograd. Chunks are as large as `boundary_bytes` allows.

Shapes: S sequences, B sequences of a batch, T tokens, D hidden_size, C channels of a tap.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from intraslice.algebra.scores import rope_pair_scores
from intraslice.algebra.statistics import BlockSecondMoment, Sum
from intraslice.checkpoint.writer import write_tensors
from intraslice.errors import NumericalError
from intraslice.layers.decoder import DecoderLayer
from intraslice.methods.blockwise.allocators import MaskScores
from intraslice.progress import Progress
from intraslice.streaming.model import StreamedModel

SCAN_VERSION = 3
"""Part of the name of a kept gradient pass: raise it when what is measured changes."""


@dataclass
class _Accumulators:
    """What the pass has gathered so far; saved after each chunk so that an interrupted run goes on from there."""

    context_grad: Tensor  # [L, S, H * d]
    act_grad: Tensor  # [L, S, F]
    context_moment: Tensor  # [L, H, d, d]
    act_moment: Tensor  # [L, F / w, w, w]
    query_abs: Tensor  # [L, H, d], sums of |q| after RoPE
    key_abs: Tensor  # [L, K, d]
    done: int = 0
    seconds: float = 0.0  # spent on it

    def save(self, path: Path) -> None:
        """Write the sums and how many sequences they cover."""
        numbers = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("done", "seconds")}
        write_tensors(path, {**vars(self), **numbers})

    @classmethod
    def load(cls, path: Path) -> _Accumulators:
        """Read what `save` wrote."""
        tensors = load_file(path)
        numbers = {"done": int(tensors["done"]), "seconds": float(tensors["seconds"])}
        return cls(**{**tensors, **numbers})  # type: ignore[arg-type]

    def scores(self, num_tokens: int, pairs_to_channels: Tensor | None) -> MaskScores:
        """Return what the allocators read, layer by layer."""
        pair_scores = None
        if pairs_to_channels is not None:
            pair_scores = tuple(
                rope_pair_scores(query_abs, key_abs, num_tokens, pairs_to_channels).sum(0)
                for query_abs, key_abs in zip(self.query_abs, self.key_abs, strict=True)
            )
        return MaskScores(
            context_grad=tuple(self.context_grad),
            act_grad=tuple(self.act_grad),
            context_moment=tuple(self.context_moment),
            act_moment=tuple(self.act_moment),
            pair_scores=pair_scores,
        )


def scan_seconds(path: Path) -> float:
    """Return what the gradient pass in a file has cost, whichever run made it; 0 when there is none."""
    if not path.exists():
        return 0.0
    with safe_open(path, framework="pt") as file:
        return float(file.get_tensor("seconds"))


def block_width(channels: int, blocks: int) -> int:
    """Return the width of equal blocks of channels: the divisor of `channels` nearest to channels / blocks."""
    wanted = max(1, channels // blocks)
    return min((w for w in range(1, channels + 1) if channels % w == 0), key=lambda w: (abs(w - wanted), w))


def boundary_states_bytes(num_layers: int, seqlen: int, hidden_size: int, itemsize: int) -> int:
    """Return the memory that the states at the layer boundaries of one sequence take."""
    return (num_layers + 2) * seqlen * hidden_size * itemsize


def chunk_size(boundary_bytes: int, states_bytes: int, batch: int) -> int:
    """Return how many sequences go through the layers, forth and back, before the layers are loaded again.

    Args:
        boundary_bytes: memory for the states at the layer boundaries.
        states_bytes: of one sequence.
        batch: sequences in one forward batch; at least so many.
    """
    return max(batch, boundary_bytes // states_bytes // batch * batch)


def scan_mask_gradients(
    model: StreamedModel,
    tokens_ST: Tensor,
    *,
    batch: int,
    boundary_bytes: int,
    num_ffn_blocks: int,
    save_path: Path,
    progress: Progress,
) -> MaskScores:
    """Return the mask gradients and block moments of all layers; Paper: Eq. 9-11, Algorithm 1 part 1.

    Args:
        model: the streamed dense model.
        tokens_ST: calibration token ids, [S, T].
        batch: sequences in one forward batch.
        boundary_bytes: memory for the states at the layer boundaries of one chunk.
        num_ffn_blocks: into how many blocks the channels of `act` are cut.
        save_path: file that holds the sums of the finished chunks.
        progress: shows the passes.

    Raises:
        NumericalError: a loss or gradient is NaN or infinite.
    """
    num_sequences, seqlen = tokens_ST.shape
    shape = model.dense_shape
    context_dim = shape.num_attention_heads * shape.v_head_dim
    width = block_width(shape.intermediate_size, num_ffn_blocks)
    layers = model.num_layers
    if save_path.exists():
        sums = _Accumulators.load(save_path)
    else:
        sums = _Accumulators(
            torch.zeros(layers, num_sequences, context_dim, dtype=torch.float64),
            torch.zeros(layers, num_sequences, shape.intermediate_size, dtype=torch.float64),
            torch.zeros(layers, shape.num_attention_heads, shape.v_head_dim, shape.v_head_dim, dtype=torch.float64),
            torch.zeros(layers, shape.intermediate_size // width, width, width, dtype=torch.float64),
            torch.zeros(layers, shape.num_attention_heads, shape.qk_head_dim, dtype=torch.float64),
            torch.zeros(layers, shape.num_key_value_heads, shape.qk_head_dim, dtype=torch.float64),
        )
    states = boundary_states_bytes(layers, seqlen, model.config.hidden_size, model.placement.compute_dtype.itemsize)
    chunk = chunk_size(boundary_bytes, states, batch)
    with progress.step("mask gradients", total=num_sequences * layers * 2) as advance:
        advance(sums.done * layers * 2)
        while sums.done < num_sequences:
            started = time.monotonic()
            stop = min(sums.done + chunk, num_sequences)
            _scan_chunk(model, tokens_ST, slice(sums.done, stop), batch, sums, advance)
            sums.done = stop
            sums.seconds += time.monotonic() - started
            sums.save(save_path)
    for name, grads in (("attention", sums.context_grad), ("FFN", sums.act_grad)):
        bad = (~torch.isfinite(grads)).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise NumericalError(f"the {name} mask gradients of layer {bad[0]} are NaN or infinite.")
    return sums.scores(tokens_ST.numel(), model.pairs_to_channels)


def _scan_chunk(
    model: StreamedModel,
    tokens_ST: Tensor,
    chunk: slice,
    batch: int,
    sums: _Accumulators,
    advance: Callable[[int], None],
) -> None:
    device, stat_dtype = model.placement.device, model.placement.stat_dtype
    parts = [slice(start, min(start + batch, chunk.stop)) for start in range(chunk.start, chunk.stop, batch)]
    # boundaries[b][l]: input of layer l for batch b; the last entry is the output of the last layer.
    boundaries = [[model.embed(tokens_ST[part])] for part in parts]
    for index in range(model.num_layers):
        block = model.load_layer(index)
        context_moment = BlockSecondMoment(*sums.context_moment[index].shape[:2], device=device, dtype=stat_dtype)
        act_moment = BlockSecondMoment(*sums.act_moment[index].shape[:2], device=device, dtype=stat_dtype)
        query_abs = Sum(*sums.query_abs[index].shape, device=device, dtype=stat_dtype)
        key_abs = Sum(*sums.key_abs[index].shape, device=device, dtype=stat_dtype)
        measured = _Measured(context_moment, act_moment, query_abs, key_abs)
        for part, states in zip(parts, boundaries, strict=True):
            states.append(_forward(block, states[-1], measured))
            advance(part.stop - part.start)
        sums.context_moment[index] += context_moment.value
        sums.act_moment[index] += act_moment.value
        sums.query_abs[index] += query_abs.value
        sums.key_abs[index] += key_abs.value
    gradients = []
    for part, states in zip(parts, boundaries, strict=True):
        gradients.append(model.loss_gradient(tokens_ST[part], states.pop())[1])
    for index in reversed(range(model.num_layers)):
        block = model.load_layer(index)
        for number, part in enumerate(parts):
            gradients[number], context_grad, act_grad = _backward(block, boundaries[number].pop(), gradients[number])
            sums.context_grad[index, part] = context_grad.to("cpu", torch.float64)
            sums.act_grad[index, part] = act_grad.to("cpu", torch.float64)
            advance(part.stop - part.start)


@dataclass(frozen=True)
class _Measured:
    """The statistics of one layer that its forward pass feeds."""

    context_moment: BlockSecondMoment
    act_moment: BlockSecondMoment
    query_abs: Sum
    key_abs: Sum


@torch.no_grad()
def _forward(block: DecoderLayer, hidden_BTD: Tensor, measured: _Measured) -> Tensor:
    attention = block.attention
    query, key, value = block.project(attention, block.attention_input(hidden_BTD))
    measured.query_abs.update(query.abs().sum((0, 2)))
    measured.key_abs.update(key.abs().sum((0, 2)))
    context = block.attend(attention, query, key, value)
    measured.context_moment.update(context.flatten(0, 1))
    middle = block.add_attention(hidden_BTD, block.out_projection(context))
    act = block.act(block.ffn_input(middle))
    measured.act_moment.update(act.flatten(0, 1))
    return block.add_ffn(middle, block.down_projection(act))


def _backward(block: DecoderLayer, hidden_BTD: Tensor, gradient_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of the loss at the layer's input, and of a mask on `context` and on `act` per sequence.

    A mask m multiplies every token's channel, so dL/dm_c is the sum over tokens of x_tc * dL/dx_tc.
    """
    with torch.enable_grad():
        hidden = hidden_BTD.detach().requires_grad_(True)
        context = block.context(block.attention, block.attention_input(hidden))
        middle = block.add_attention(hidden, block.out_projection(context))
        act = block.act(block.ffn_input(middle))
        output = block.add_ffn(middle, block.down_projection(act))
        grad_hidden, grad_context, grad_act = torch.autograd.grad(output, (hidden, context, act), gradient_BTD)
    with torch.no_grad():
        return (
            grad_hidden,
            (context.detach() * grad_context).float().sum(1),
            (act.detach() * grad_act).float().sum(1),
        )
