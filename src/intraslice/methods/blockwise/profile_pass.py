"""One forward pass of the dense model, one layer in memory: what allocation without gradients reads."""

from __future__ import annotations

import torch

from intraslice.algebra.statistics import Statistics
from intraslice.errors import NumericalError
from intraslice.layers.sites import ATTENTION
from intraslice.methods.blockwise.allocators.profile import ModelProfile
from intraslice.methods.blockwise.scores import fluctuation_scores
from intraslice.placement import for_float64
from intraslice.progress import Progress
from intraslice.streaming.hidden import HiddenStates
from intraslice.streaming.model import StreamedModel


@torch.no_grad()
def profile_layers(model: StreamedModel, hidden: HiddenStates, progress: Progress) -> ModelProfile:
    """Measure fluctuations and similarities of all layers.

    Args:
        model: the streamed dense model.
        hidden: inputs of the first layer; overwritten by the outputs of the last one.
        progress: shows the layers.

    Raises:
        NumericalError: activations are NaN or infinite.
    """
    fluctuations, similarities = [], []
    with progress.step("layer profiles", total=model.num_layers) as advance:
        for index in range(model.num_layers):
            fluctuation, similarity = _profile_layer(model, index, hidden)
            fluctuations.append(fluctuation)
            similarities.append(similarity)
            advance(1)
    return ModelProfile(tuple(fluctuations), tuple(similarities))


def _profile_layer(model: StreamedModel, index: int, hidden: HiddenStates) -> tuple[dict[str, torch.Tensor], float]:
    """Return the fluctuation scores of each site, one row per unit, and the similarity; advances the states."""
    layer, dtype = model.load_layer(index), model.placement.stat_dtype
    statistics = Statistics(model.placement.stat_device, dtype)
    sites = [site.name for site in model.sites.layers[index]]
    for site in sites:
        width = layer.output_projection(site).in_features
        statistics.sum(f"{site}.sum", width)
        statistics.sum(f"{site}.energy", width)
    similarity, num_tokens = statistics.number("similarity"), statistics.number("num_tokens")
    for part in hidden.slices():
        states = hidden.read(part)
        output, taps = layer.run(states)
        for site in sites:
            values = for_float64(taps[site].flatten(0, 1)).to(dtype)
            statistics.of(f"{site}.sum").update(values.sum(0))
            statistics.of(f"{site}.energy").update(values.square().sum(0))
        cosines = torch.nn.functional.cosine_similarity(states.float(), output.float(), dim=-1)  # [B, T]
        similarity.update(float(for_float64(cosines).sum(dtype=torch.float64)))
        num_tokens.update(cosines.numel())
        hidden.write(part, output)
    sums = statistics.finish()
    count = int(sums["num_tokens"])
    fluctuation = {}
    for site in model.sites.layers[index]:
        weight = layer.output_projection(site.name).weight.to("cpu")
        scores = fluctuation_scores(sums[f"{site.name}.energy"], sums[f"{site.name}.sum"], count, weight)
        if not torch.isfinite(scores).all():
            raise NumericalError(f"layer {index}: the activations contain NaN or infinite values.")
        fluctuation[site.name] = scores.view(site.units if site.kind == ATTENTION else len(scores), -1)
    return fluctuation, float(sums["similarity"]) / count
