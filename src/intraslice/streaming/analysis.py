"""What the activations of a model look like: spectra, effective ranks, and how much attention needs of its RoPE pairs.

The dense model is measured layer by layer, with one layer in memory. Nothing is kept but second moments.

Shapes: N sequences, T tokens, D hidden_size, H query heads, K kv heads, d head_dim, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intraslice.algebra.linalg import decomposing
from intraslice.algebra.scores import rope_pair_scores
from intraslice.algebra.selection import top_indices
from intraslice.algebra.statistics import BlockSecondMoment, SecondMoment, Statistics
from intraslice.checkpoint.reader import Checkpoint
from intraslice.errors import NumericalError
from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.sites import ATTENTION, FFN
from intraslice.placement import Placement, for_float64, with_float64
from intraslice.progress import Progress, SilentProgress
from intraslice.streaming.hidden import HiddenStates
from intraslice.streaming.model import StreamedModel

RANK_ENERGY = 0.99
"""The share of the energy that decides the effective rank; Paper: appendix A."""

SPECTRUM_POINTS = 64
KEPT_FRACTIONS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """Return how many of the largest eigenvalues hold 99 % of their sum, [...]; Paper: appendix A, Figure 1.

    Args:
        eigenvalues: of second moments, largest first, not negative, [..., C]. The rank of all zeros is 0.
    """
    held = eigenvalues.cumsum(-1)
    total = eigenvalues.sum(-1)
    return (held < RANK_ENERGY * total.unsqueeze(-1)).sum(-1) + (total > 0)


def sample_spectrum(eigenvalues_C: Tensor) -> list[float]:
    """Return normalised eigenvalues at 64 evenly spaced ranks, the first and the last among them.

    Args:
        eigenvalues_C: largest first; all are returned when there are no more than 64.
    """
    count = len(eigenvalues_C)
    ranks = torch.linspace(0, count - 1, min(count, SPECTRUM_POINTS), dtype=torch.float64).round().long()
    return _normalized(eigenvalues_C)[ranks].tolist()


def pair_masks(pair_scores_Kp: Tensor, pairs_to_channels: Tensor, kept: int) -> Tensor:
    """Return ones at the channels of the best pairs of each kv head and zeros elsewhere, [K, d].

    Args:
        pair_scores_Kp: importance of each rotary pair, [K, d / 2].
        pairs_to_channels: channels of each pair, int64 [d / 2, 2].
        kept: pairs that each kv head keeps.
    """
    masks = torch.zeros(pair_scores_Kp.shape[0], pairs_to_channels.numel(), dtype=torch.float64)
    for mask, scores in zip(masks, pair_scores_Kp, strict=True):
        mask[pairs_to_channels[top_indices(scores, kept)].flatten()] = 1.0
    return masks


@torch.no_grad()
def analyze_model(
    checkpoint: Checkpoint,
    tokens_NT: Tensor,
    *,
    kept_fractions: Sequence[float] = KEPT_FRACTIONS,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure spectra, effective ranks and RoPE-pair sensitivity of every layer of a dense model.

    Spectra are the eigenvalues of uncentered second moments over their sum, sampled at 64 ranks: of `context` for each
    head alone (mean over the heads), of `act`, and of the residual stream after each layer. Effective ranks are
    those of `effective_rank`, of `context` again the mean over heads.

    The error of a kept fraction of RoPE pairs is ||c - c'|| / ||c|| of a head's context c, mean over the heads
    (Paper: Figure 7, appendix C.1); each kv head keeps the pairs that pruning would keep.

    Args:
        checkpoint: the dense model.
        tokens_NT: token ids, int64.
        kept_fractions: shares of the RoPE pairs to try.
        device: "auto", "cpu" or a torch device.
        progress: shows the layers.

    Returns:
        Plain JSON types; lists have one entry per layer, head_dim and intermediate_size are the largest ones.
        `rope_pairs` is None without RoPE, and has no numbers (None) in the rows of layers without it.

    Raises:
        NumericalError: activations are NaN or infinite.
    """
    placement = Placement.choose(device, "auto", checkpoint.dtype)
    N, T = tokens_NT.shape
    streamed = StreamedModel(checkpoint, placement, (1, T))
    hidden = HiddenStates((N, T, streamed.config.hidden_size), placement.compute_dtype, 1, placement.device)
    for part in hidden.slices():
        hidden.write(part, streamed.embed(tokens_NT[part]))
    streamed.release()
    fractions = tuple(kept_fractions) if any(map(streamed.rotated, range(streamed.num_layers))) else ()
    layers = []
    with (progress or SilentProgress()).step("analysis", total=streamed.num_layers) as advance:
        for index in range(streamed.num_layers):
            layers.append(_analyze_layer(streamed, index, hidden, fractions))
            advance(1)
    return {
        "context_spectrum": [layer.context_spectrum() for layer in layers],
        "act_spectrum": [sample_spectrum(layer.eigenvalues["act"]) for layer in layers],
        "residual_spectrum": [sample_spectrum(layer.eigenvalues["residual"]) for layer in layers],
        "effective_rank": {
            name: [float(effective_rank(layer.eigenvalues[name]).double().mean()) for layer in layers]
            for name in layers[0].eigenvalues
        },
        "rope_pairs": {
            "kept_fraction": list(fractions),
            "relative_error": [layer.pair_errors or [None] * len(fractions) for layer in layers],
        }
        if fractions
        else None,
        "hidden_size": streamed.config.hidden_size,
        "head_dim": max(shape.v_head_dim for shape in streamed.dense_shapes),
        "intermediate_size": max(shape.intermediate_size for shape in streamed.dense_shapes),
        "num_tokens": N * T,
    }


@torch.no_grad()
def effective_ranks(model: PreTrainedModel, tokens_NT: Tensor) -> list[float]:
    """Return the effective rank of the output of each decoder layer, of a dense or pruned model; Paper: Figure 1.

    The output of the last layer is taken before the final norm, like all others.

    Args:
        model: in evaluation mode.
        tokens_NT: token ids, int64.

    Raises:
        NumericalError: activations are NaN or infinite.
    """
    layers: Any = model.get_decoder().layers
    moments: dict[int, SecondMoment] = {}

    def collect(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states = (output[0] if isinstance(output, tuple) else output).flatten(0, -2)
            if index not in moments:
                moments[index] = SecondMoment(states.shape[-1], None, with_float64(states.device), torch.float64)
            moments[index].update(states)

        return hook

    handles = [layer.register_forward_hook(collect(index)) for index, layer in enumerate(layers)]
    try:
        for row in tokens_NT:
            model.base_model(input_ids=row[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [float(effective_rank(_eigenvalues(moments[index].value, index))) for index in range(len(layers))]


@dataclass(frozen=True)
class _LayerAnalysis:
    """What was measured in one layer.

    Attributes:
        eigenvalues: of the second moments, largest first: `context` [H, d], the others [C].
        pair_errors: error of the attention output with each fraction of the RoPE pairs.
    """

    eigenvalues: dict[str, Tensor]
    pair_errors: list[float]

    def context_spectrum(self) -> list[float]:
        """Return the mean over heads of their normalised spectra."""
        return sample_spectrum(_normalized(self.eigenvalues["context"]).mean(0))


def _analyze_layer(
    model: StreamedModel, index: int, hidden: HiddenStates, fractions: Sequence[float]
) -> _LayerAnalysis:
    """Measure a layer and overwrite the hidden states with its outputs."""
    block, shape = model.load_layer(index), model.dense_shapes[index]
    device, dtype = model.placement.stat_device, model.placement.stat_dtype
    D = model.config.hidden_size
    context_moment = BlockSecondMoment(shape.num_attention_heads, shape.v_head_dim, device, dtype)
    widths = {"act": shape.intermediate_size, "attention_output": D, "ffn_output": D, "residual": D}
    moments = {name: SecondMoment(width, None, device, dtype) for name, width in widths.items()}
    pairs = model.pairs_to_channels(index)
    pair_errors = None
    if fractions and pairs is not None:
        pair_errors = _PairErrors(model, block, pairs, hidden, fractions)
    for part in hidden.slices():
        states = hidden.read(part)
        query, key, value = block.project(block.attention, block.attention_input(states))
        context = block.attend(block.attention, query, key, value)
        if pair_errors is not None:
            pair_errors.update(query, key, value, context)
        attention_output = block.added(ATTENTION, block.out_projection(context))
        middle = block.add_attention(states, attention_output)
        act = block.act(block.ffn_input(states if block.parallel else middle))
        ffn_output = block.added(FFN, block.down_projection(act))
        residual = block.add_ffn(middle, ffn_output)
        hidden.write(part, residual)
        context_moment.update(context.flatten(0, 1))
        outputs = {"act": act, "attention_output": attention_output, "ffn_output": ffn_output, "residual": residual}
        for name, x_BTC in outputs.items():
            moments[name].update(x_BTC.flatten(0, 1))
    values = {"context": context_moment.value, **{name: moment.value for name, moment in moments.items()}}
    return _LayerAnalysis(
        {name: _eigenvalues(moment, index) for name, moment in values.items()},
        [] if pair_errors is None else pair_errors.value,
    )


class _PairErrors:
    """Error of each head's context when each kv head keeps only its best RoPE pairs.

    A dropped pair is a pair of channels of the query set to zero: its products vanish from the scores.

    Args:
        model: the streamed dense model.
        block: the layer, at its dense shape.
        pairs: channels of each rotary pair, int64 [d / 2, 2].
        hidden: inputs of the layer; read once, to rank the pairs.
        fractions: shares of the pairs to keep.
    """

    def __init__(
        self,
        model: StreamedModel,
        block: DecoderLayer,
        pairs: Tensor,
        hidden: HiddenStates,
        fractions: Sequence[float],
    ) -> None:
        self._block = block
        shape = block.attention.shape
        H, K = shape.num_attention_heads, shape.num_key_value_heads
        statistics = Statistics(model.placement.stat_device, model.placement.stat_dtype)
        query_abs = statistics.sum("query", H, shape.qk_head_dim)
        key_abs = statistics.sum("key", K, shape.qk_head_dim)
        num_tokens = statistics.number("num_tokens")
        for part in hidden.slices():
            query, key, _ = block.project(block.attention, block.attention_input(hidden.read(part)))
            query_abs.update(query.abs().sum((0, 2)))
            key_abs.update(key.abs().sum((0, 2)))
            num_tokens.update(query.shape[0] * query.shape[2])
        scores = rope_pair_scores(query_abs.value, key_abs.value, round(float(num_tokens.value)), pairs)  # [H, d / 2]
        per_kv = scores.view(K, H // K, -1).sum(1)
        self._channel_masks = [
            pair_masks(per_kv, pairs, max(1, round(fraction * len(pairs))))
            .repeat_interleave(H // K, 0)
            .to(model.placement.device, model.placement.compute_dtype)
            for fraction in fractions
        ]
        self._energy = statistics.sum("energy", H)
        self._errors = statistics.sum("errors", len(fractions), H)

    def update(self, query_BHTd: Tensor, key_BKTd: Tensor, value_BKTd: Tensor, context_BTC: Tensor) -> None:
        """Add the tokens of one batch; `context` is what all pairs give."""
        errors = []
        for mask_Hd in self._channel_masks:
            context = self._block.attend(self._block.attention, query_BHTd * mask_Hd[:, None], key_BKTd, value_BKTd)
            errors.append(self._energies(context_BTC - context))
        self._energy.update(self._energies(context_BTC))
        self._errors.update(torch.stack(errors))

    def _energies(self, context_BTC: Tensor) -> Tensor:
        """Return the squared norm of each head's part, [H]."""
        heads = self._block.attention.num_heads
        squares = context_BTC.unflatten(2, (heads, -1)).float().square()
        return for_float64(squares).sum((0, 1, 3), dtype=torch.float64)

    @property
    def value(self) -> list[float]:
        """The relative error of each fraction, mean over the heads."""
        energy = self._energy.value.clamp_min(torch.finfo(torch.float64).tiny)
        return (self._errors.value / energy).sqrt().mean(1).tolist()


def _eigenvalues(moment: Tensor, layer: int) -> Tensor:
    """Return eigenvalues [..., C], largest first, clipped at 0."""
    if not torch.isfinite(moment).all():
        raise NumericalError(f"layer {layer}: the activations contain NaN or infinite values.")
    try:
        with decomposing():
            return torch.linalg.eigvalsh(moment).flip(-1).clamp_min(0.0)
    except NumericalError as error:
        raise NumericalError(f"layer {layer}: {error}") from error


def _normalized(eigenvalues: Tensor) -> Tensor:
    total = eigenvalues.sum(-1, keepdim=True)
    return eigenvalues / total.clamp_min(torch.finfo(eigenvalues.dtype).tiny)
