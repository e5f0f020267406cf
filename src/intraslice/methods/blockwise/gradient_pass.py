"""The gradient pass: mask gradients of every channel, one backward per sequence, one layer in memory.

A chunk of sequences runs forward through all layers, keeping only the states at the layer boundaries; then each
layer is loaded again, last to first, and recomputed with autograd. Chunks are as large as `boundary_bytes` allows.

Shapes: S sequences, B sequences of a batch, T tokens, D hidden_size, C channels of a tap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from intraslice.algebra.linalg import eigh_descending
from intraslice.algebra.scores import rope_pair_scores
from intraslice.algebra.statistics import Statistics
from intraslice.checkpoint.tensorfile import read_sealed, write_tensors
from intraslice.errors import CheckpointError, NumericalError
from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.sites import ATTENTION, FFN
from intraslice.methods.blockwise.allocators.mask_gradient import MaskGradients, SiteGradients
from intraslice.placement import Placement
from intraslice.progress import Progress
from intraslice.streaming.backward import backward_chunk, sequences_of_chunk
from intraslice.streaming.model import StreamedModel

PASS_VERSION = 5
"""Part of the name of a kept gradient pass: raise it when what is measured, or the form of the file, changes."""

BASIS_TOKENS = 8192
"""How many tokens, in whole batches, decide the directions whose masks are differentiated exactly."""


class _Sums:
    """What the pass has gathered so far; saved after each chunk so that an interrupted run goes on from there.

    Attributes:
        layers: for each layer `<site>.grad` [S, C] and `<site>.moment` [C / w, w, w] of each site, and the sums of |q|
            [H, d] and |k| [K, d] after RoPE; with bases also `<site>.rotated` [S, C].
        bases: for each layer, the directions [C / w, w, w] of each site whose masks are differentiated; None for none.
        done: sequences that are in the sums.
        seconds: spent on them.
    """

    def __init__(self, model: StreamedModel, num_sequences: int, num_groups: int, rotated: bool) -> None:
        self.done, self.seconds = 0, 0.0
        self.layers = [_statistics(model, i, num_groups, None, num_sequences) for i in range(model.num_layers)]
        self.bases: list[dict[str, Tensor]] | None = None
        if rotated:
            for statistics in self.layers:
                for site, moment in _blocks(statistics).items():
                    statistics.rows(f"{site}.rotated", num_sequences, moment.shape[0] * moment.shape[1])

    def save(self, path: Path, measured: str) -> None:
        """Write the sums and how many sequences they cover; `measured` is the digest of what decides them."""
        tensors = {f"{i}.{name}": sum_ for i, layer in enumerate(self.layers) for name, sum_ in layer.finish().items()}
        numbers = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("done", "seconds")}
        for index, layer in enumerate(self.bases or ()):
            tensors |= {f"basis.{index}.{site}": basis for site, basis in layer.items()}
        write_tensors(path, {**tensors, **numbers}, sealed_for=measured)

    def load(self, path: Path, measured: str) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is not what was written, or sums of something else.
        """
        tensors = read_sealed(path, measured)
        self.done, self.seconds = int(tensors["done"]), float(tensors["seconds"])
        for index, layer in enumerate(self.layers):
            prefix = f"{index}."
            layer.add({name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)})
        if any(name.startswith("basis.") for name in tensors):
            self.bases = [
                {site: tensors[f"basis.{index}.{site}"] for site in _blocks(layer)}
                for index, layer in enumerate(self.layers)
            ]

    def gradients(self, num_tokens: int, pairs_to_channels: Sequence[Tensor | None]) -> MaskGradients:
        """Return what the allocation rules read.

        Args:
            num_tokens: in the sums.
            pairs_to_channels: of each layer, the channels of each rotary pair [d / 2, 2]; None without RoPE.
        """
        layers: list[dict[str, SiteGradients]] = []
        pair_scores: list[Tensor | None] = []
        for statistics, pairs in zip(self.layers, pairs_to_channels, strict=True):
            sums = statistics.finish()
            sites = dict.fromkeys(name.partition(".")[0] for name in sums if name.endswith(".grad"))
            layers.append(
                {
                    site: SiteGradients(sums[f"{site}.grad"], sums[f"{site}.moment"], sums.get(f"{site}.rotated"))
                    for site in sites
                }
            )
            scores = None
            if pairs is not None:
                scores = rope_pair_scores(sums["query_abs"], sums["key_abs"], num_tokens, pairs).sum(0)
            pair_scores.append(scores)
        rotates = any(scores is not None for scores in pair_scores)
        return MaskGradients(tuple(layers), tuple(pair_scores) if rotates else None)


def _blocks(statistics: Statistics) -> dict[str, Tensor]:
    """Return the second moments of a layer by site, [C / w, w, w]."""
    sums = statistics.finish()
    return {name.partition(".")[0]: sum_ for name, sum_ in sums.items() if name.endswith(".moment")}


def _statistics(
    model: StreamedModel, index: int, num_groups: int, placement: Placement | None, num_sequences: int = 0
) -> Statistics:
    """Return the sums of one layer: of one chunk where it is computed, or of all chunks, in float64 on the CPU."""
    if placement is None:
        statistics = Statistics(torch.device("cpu"), torch.float64)
    else:
        statistics = Statistics(placement.stat_device, placement.stat_dtype)
    shape = model.dense_shapes[index]
    heads, width = shape.num_attention_heads, group_width(shape.intermediate_size, num_groups)
    blocks = {ATTENTION: (heads, shape.v_head_dim), FFN: (shape.intermediate_size // width, width)}
    for site, (count, block) in blocks.items():
        statistics.block_second_moment(f"{site}.moment", count, block)
        if num_sequences:
            statistics.rows(f"{site}.grad", num_sequences, count * block)
    statistics.sum("query_abs", heads, shape.qk_head_dim)
    statistics.sum("key_abs", shape.num_key_value_heads, shape.qk_head_dim)
    return statistics


def pass_seconds(path: Path) -> float:
    """Return what the gradient pass in a file has cost, whichever run made it; 0 when there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return float(file.get_tensor("seconds"))
    except (OSError, SafetensorError):
        # Not there, or damaged: then the pass is made again.
        return 0.0


def group_width(channels: int, groups: int) -> int:
    """Return the width of equal groups of channels: the divisor of `channels` nearest to channels / groups."""
    wanted = max(1, channels // groups)
    return min((w for w in range(1, channels + 1) if channels % w == 0), key=lambda w: (abs(w - wanted), w))


def measure_gradients(
    model: StreamedModel,
    tokens_ST: Tensor,
    *,
    boundary_bytes: int,
    num_channel_groups: int,
    rotated: bool = False,
    save_path: Path,
    measured: str = "",
    progress: Progress,
) -> MaskGradients:
    """Return the mask gradients and second moments of all layers; Paper: Eq. 9-11, Algorithm 1 part 1.

    Args:
        model: the streamed dense model.
        tokens_ST: calibration token ids, [S, T].
        boundary_bytes: memory for the states at the layer boundaries of one chunk.
        num_channel_groups: into how many groups the channels of `act` are cut.
        rotated: whether masks on the eigenvectors of the blocks are differentiated as well.
        save_path: file that holds the sums of the finished chunks.
        measured: digest of everything that decides them; sums of something else are not taken.
        progress: shows the passes.

    Raises:
        NumericalError: a loss or gradient is NaN or infinite.
    """
    num_sequences, seqlen = tokens_ST.shape
    layers = model.num_layers
    sums = _Sums(model, num_sequences, num_channel_groups, rotated)
    if save_path.exists():
        try:
            sums.load(save_path, measured)
        except CheckpointError as error:
            progress.note(f"{error}; the gradients are measured again")
    chunk = sequences_of_chunk(model, seqlen, boundary_bytes)
    with progress.step("mask gradients", total=num_sequences * layers * 2) as advance:
        advance(sums.done * layers * 2)
        if rotated and sums.bases is None:
            started = time.monotonic()
            sums.bases = leading_bases(model, tokens_ST, num_channel_groups)
            sums.seconds += time.monotonic() - started
        while sums.done < num_sequences:
            started = time.monotonic()
            stop = min(sums.done + chunk, num_sequences)
            _measure_chunk(model, tokens_ST, slice(sums.done, stop), num_channel_groups, sums, advance)
            sums.done = stop
            sums.seconds += time.monotonic() - started
            sums.save(save_path, measured)
    gradients = sums.gradients(tokens_ST.numel(), [model.pairs_to_channels(index) for index in range(layers)])
    for index, layer in enumerate(gradients.layers):
        for site, gradient in layer.items():
            if not torch.isfinite(gradient.grad).all():
                name = "FFN" if site == FFN else site
                raise NumericalError(f"the {name} mask gradients of layer {index} are NaN or infinite.")
    return gradients


def leading_bases(model: StreamedModel, tokens_ST: Tensor, num_groups: int) -> list[dict[str, Tensor]]:
    """Return the eigenvectors of the blocks of each site, [C / w, w, w] of each layer, from the first sequences.

    A direction has to be the same for all sequences and known before the first backward pass; it need not be the
    eigenvector of all tokens to the last digit, and some thousand tokens decide well in so few dimensions.
    """
    batch, seqlen = model.batch_shape
    starts = range(0, max(1, min(len(tokens_ST), BASIS_TOKENS // seqlen)), batch)
    parts = [tokens_ST[start : start + batch] for start in starts]
    states = [model.embed(part) for part in parts]
    bases = []
    for index in range(model.num_layers):
        layer = model.load_layer(index)
        statistics = _statistics(model, index, num_groups, model.placement)
        states = [_forward(layer, part, statistics) for part in states]
        bases.append({site: eigh_descending(moment)[1] for site, moment in _blocks(statistics).items()})
    return bases


def _measure_chunk(
    model: StreamedModel,
    tokens_ST: Tensor,
    chunk: slice,
    num_groups: int,
    sums: _Sums,
    advance: Callable[[int], None],
) -> None:
    placement = model.placement
    # Rows of the next batch in each layer: batches come down in the order in which they went up.
    rows = [chunk.start] * model.num_layers

    def forward(index: int, layer: DecoderLayer, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
        statistics = _statistics(model, index, num_groups, placement)
        for hidden in inputs:
            yield _forward(layer, hidden, statistics)
        sums.layers[index].merge(statistics)

    # All batches of a layer come one after the other.
    @lru_cache(maxsize=1)
    def placed_bases(index: int) -> dict[str, Tensor]:
        bases = {} if sums.bases is None else sums.bases[index]
        return {site: basis.to(placement.device, placement.compute_dtype) for site, basis in bases.items()}

    def step(index: int, layer: DecoderLayer, hidden: Tensor, gradient: Tensor) -> Tensor:
        at_input, masks = _backward(layer, hidden, gradient, placed_bases(index))
        start, rows[index] = rows[index], rows[index] + len(hidden)
        for name, masked in masks.items():
            sums.layers[index].of(name).write(slice(start, rows[index]), masked)
        return at_input

    backward_chunk(model, tokens_ST[chunk], step, advance=advance, forward=forward)


@torch.no_grad()
def _forward(layer: DecoderLayer, hidden_BTD: Tensor, statistics: Statistics) -> Tensor:
    def watch(query: Tensor, key: Tensor) -> None:
        statistics.of("query_abs").update(query.abs().sum((0, 2)))
        statistics.of("key_abs").update(key.abs().sum((0, 2)))

    output, taps = layer.run(hidden_BTD, watch)
    for site, tap in taps.items():
        statistics.of(f"{site}.moment").update(tap.flatten(0, 1))
    return output


def _backward(
    layer: DecoderLayer, hidden_BTD: Tensor, gradient_BTD: Tensor, bases: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return gradients of the loss at the layer's input, and of masks on each site's tap: `<site>.grad`, [B, C].

    A mask m multiplies every token's channel, so dL/dm_c is the sum over tokens of x_tc * dL/dx_tc. Masks on the
    directions q_i of a basis [C / w, w, w] multiply the components x q_i of a block of channels, so that their
    gradients are the sums over tokens of (x_t q_i) (dL/dx_t q_i): `<site>.rotated`, [B, C].
    """
    with torch.enable_grad():
        hidden = hidden_BTD.detach().requires_grad_(True)
        output, taps = layer.run(hidden)
        at_input, *at_taps = torch.autograd.grad(output, (hidden, *taps.values()), gradient_BTD)
    with torch.no_grad():
        masks = {}
        for (site, tap), gradient in zip(taps.items(), at_taps, strict=True):
            masks[f"{site}.grad"] = (tap.detach() * gradient).float().sum(1)
            if site in bases:
                masks[f"{site}.rotated"] = rotated_mask_gradient(tap.detach(), gradient, bases[site])
        return at_input, masks


def rotated_mask_gradient(tap_BTC: Tensor, gradient_BTC: Tensor, basis_bww: Tensor) -> Tensor:
    """Return the gradient of a mask on each direction of block-diagonal bases, q_i^T (X^T G) q_i, [B, C], float32.

    Args:
        tap_BTC: X, activations of B sequences.
        gradient_BTC: G, the gradient of the loss at them.
        basis_bww: directions of each block of channels as columns, [C / w, w, w].
    """
    blocks, width, _ = basis_bww.shape
    x, g = (
        torch.einsum("btnw,nwv->btnv", tensor.unflatten(2, (blocks, width)), basis_bww)
        for tensor in (tap_BTC, gradient_BTC)
    )
    return (x * g).float().sum(1).flatten(1)
