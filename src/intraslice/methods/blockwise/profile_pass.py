"""One forward pass of the dense model, one layer in memory: what allocation without gradients reads."""

from __future__ import annotations

import torch

from intraslice.algebra.statistics import Sum
from intraslice.errors import NumericalError
from intraslice.methods.blockwise.allocators import LayerProfile
from intraslice.methods.blockwise.scores import fluctuation_scores
from intraslice.progress import Progress
from intraslice.streaming.hidden import HiddenStates
from intraslice.streaming.model import StreamedModel


@torch.no_grad()
def profile_layers(model: StreamedModel, hidden: HiddenStates, progress: Progress) -> LayerProfile:
    """Measure fluctuations and similarities of all layers.

    Args:
        model: the streamed dense model.
        hidden: inputs of the first layer; overwritten by the outputs of the last one.
        progress: shows the layers.

    Raises:
        NumericalError: activations are NaN or infinite.
    """
    profiles = []
    with progress.step("layer profiles", total=model.num_layers) as advance:
        for index in range(model.num_layers):
            profiles.append(_profile_layer(model, index, hidden))
            advance(1)
    context, act, similarity = zip(*profiles, strict=True)
    return LayerProfile(context, act, similarity)


def _profile_layer(model: StreamedModel, index: int, hidden: HiddenStates) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the fluctuation scores of `context` [H, d] and of `act` [F], and the similarity; advances the states."""
    block, shape = model.load_layer(index), model.dense_shape
    device, dtype = model.placement.device, model.placement.stat_dtype
    widths = (shape.num_attention_heads * shape.v_head_dim, shape.intermediate_size)
    sums = [Sum(width, device=device, dtype=dtype) for width in widths]
    energies = [Sum(width, device=device, dtype=dtype) for width in widths]
    similarity, num_tokens = 0.0, 0
    for part in hidden.slices():
        states = hidden.read(part)
        context = block.context(block.attention, block.attention_input(states))
        middle = block.add_attention(states, block.out_projection(context))
        act = block.act(block.ffn_input(middle))
        output = block.add_ffn(middle, block.down_projection(act))
        for tap, total, energy in zip((context, act), sums, energies, strict=True):
            values = tap.flatten(0, 1).to(dtype)
            total.update(values.sum(0))
            energy.update(values.square().sum(0))
        cosines = torch.nn.functional.cosine_similarity(states.float(), output.float(), dim=-1)  # [B, T]
        similarity += float(cosines.sum(dtype=torch.float64))
        num_tokens += cosines.numel()
        hidden.write(part, output)
    projections = (block.out_projection, block.down_projection)
    context_scores, act_scores = (
        fluctuation_scores(energy.value, total.value, num_tokens, projection.weight.to("cpu"))
        for energy, total, projection in zip(energies, sums, projections, strict=True)
    )
    if not (torch.isfinite(context_scores).all() and torch.isfinite(act_scores).all()):
        raise NumericalError(f"layer {index}: the activations contain NaN or infinite values.")
    return context_scores.view(shape.num_attention_heads, -1), act_scores, similarity / num_tokens
