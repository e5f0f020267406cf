"""A speed as the budget: the sparsity at which a model reaches a speedup over the dense one on this machine.

Layers of the shapes that an allocation would roughly give are built with random weights and timed in turns; together
with the rest of the model they give the time of the whole model as a curve over sparsity.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from intraslice.algebra.selection import round_to_multiple
from intraslice.errors import BudgetError, RecipeError
from intraslice.layers.sites import ATTENTION, ModelSites, layer_sites
from intraslice.methods.blockwise.allocators.base import count_units
from intraslice.methods.blockwise.allocators.uniform import allocate_uniform
from intraslice.methods.blockwise.options import BlockwiseOptions
from intraslice.options import MAX_SPARSITY
from intraslice.placement import Placement
from intraslice.progress import Progress, SilentProgress
from intraslice.runtime.configuration_intraslice import dense_shape, dense_shapes
from intraslice.runtime.families_intraslice import FamilySpec, LayerShape
from intraslice.runtime.modeling_intraslice import apply_layer_shape
from intraslice.speed.layer_speed import LayerHost, one_layer_model

KV_LENGTH = 512
"""Tokens of the prompt, and of the KV cache when decoding: what `intraslice bench` measures unless told otherwise."""

_KNOTS = 10
_REPETITIONS = 5
_STEPS = 16  # tokens decoded in one repetition


@dataclass(frozen=True)
class SpeedCurve:
    """Time of a model over its sparsity: straight lines between measured points, and never rising.

    Attributes:
        sparsities: ascending, the first one is 0.
        seconds: of the whole model.
    """

    sparsities: tuple[float, ...]
    seconds: tuple[float, ...]

    @classmethod
    def fit(cls, sparsities: Sequence[float], seconds: Sequence[float]) -> SpeedCurve:
        """Return the curve through measured points; where times rise, that is noise, and neighbours are averaged.

        Least squares under the condition that times do not rise (pool adjacent violators).
        """
        pools: list[tuple[float, int]] = []  # mean of the pool, number of points in it
        for value in seconds:
            pools.append((value, 1))
            while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
                (left, left_size), (right, right_size) = pools[-2:]
                size = left_size + right_size
                pools[-2:] = [((left * left_size + right * right_size) / size, size)]
        return cls(tuple(sparsities), tuple(mean for mean, size in pools for _ in range(size)))

    @property
    def best_speedup(self) -> float:
        """The speedup at the largest sparsity."""
        return self.seconds[0] / self.seconds[-1]

    def sparsity_for(self, speedup: float) -> float | None:
        """Return the smallest sparsity at which the model is so many times as fast as dense; None if there is none."""
        wanted = self.seconds[0] / speedup
        for index, reached in enumerate(self.seconds):
            if reached > wanted:
                continue
            if index == 0:
                return self.sparsities[0]
            low, high = self.sparsities[index - 1 : index + 1]
            before = self.seconds[index - 1]
            return low + (high - low) * (before - wanted) / (before - reached)
        return None


def typical_shape(
    dense: LayerShape, spec: FamilySpec, hidden_size: int, sparsity: float, method: BlockwiseOptions
) -> LayerShape:
    """Return the shape of a layer that loses its share of a sparsity that is the same in all layers.

    Which heads go depends on the weights; here one after the other goes from the largest group.

    Args:
        dense: shape of the dense layer.
        spec: the family.
        hidden_size: D.
        sparsity: of the layer.
        method: how attention and FFN share the loss, and the multiples of widths.

    Raises:
        BudgetError: the sparsity is beyond the cap of the allocation.
    """
    total = spec.num_parameters(dense, hidden_size)
    attention = spec.num_parameters(replace(dense, intermediate_size=0), hidden_size)
    units = count_units(ModelSites((layer_sites(spec, dense, hidden_size),)), sparsity, method.allocation)
    uniform = allocate_uniform(None, units.sites, units.sparsity, method.allocation)
    share = units.to_weight_fractions(uniform).fractions(ATTENTION)[0]
    head_dim = dense.qk_head_dim
    dims = share * attention / (2 * hidden_size)  # of query and kv heads together
    whole = method.attention.heads == "whole"
    choices = list(_thinned(dense.heads_per_kv))
    if method.attention.gqa_groups == "uniform" or method.allocation.shape_freedom != "free":
        choices = [groups for groups in choices if len(set(groups)) == 1]
    if whole:
        groups = min(choices, key=lambda groups: abs(head_dim * _cost(groups) - dims))
    else:
        least = method.attention.min_head_fraction * head_dim
        groups = next((groups for groups in choices if dims / _cost(groups) >= least), choices[-1])
    multiple = method.attention.head_multiple
    wide = head_dim if whole else min(head_dim, dims / _cost(groups))
    width = round_to_multiple(wide, multiple, min(multiple, head_dim), head_dim)
    shape = LayerShape(heads_per_kv=groups, qk_head_dim=width, v_head_dim=width, intermediate_size=0)
    left = (1 - sparsity) * total - spec.num_parameters(shape, hidden_size)
    multiple, channels = method.ffn.ffn_multiple, dense.intermediate_size
    keep = round_to_multiple(left / (hidden_size * spec.num_ffn_matrices), multiple, min(multiple, channels), channels)
    return replace(shape, intermediate_size=keep)


def _cost(groups: tuple[int, ...]) -> int:
    """Return the number of query and kv heads: both cost the same weights."""
    return sum(groups) + len(groups)


def _thinned(groups: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the groups with one query head less each time, down to one head; a kv head goes with its last one."""
    while True:
        yield groups
        if sum(groups) == 1:
            return
        largest = groups.index(max(groups))
        fewer = (*groups[:largest], groups[largest] - 1, *groups[largest + 1 :])
        groups = tuple(size for size in fewer if size)


def choose_sparsity(
    config: Any,
    spec: FamilySpec,
    method: BlockwiseOptions,
    *,
    speedup: float,
    speedup_of: str,
    placement: Placement,
    progress: Progress | None = None,
) -> float:
    """Return the sparsity at which the pruned model should be `speedup` times as fast as the dense one, here.

    Args:
        config: stock config of the dense model.
        spec: its family.
        method: decides the shapes.
        speedup: dense time over pruned time of the whole model.
        speedup_of: "decode" (a token after a cache of 512) or "prefill" (512 tokens), of one sequence.
        placement: device, and dtype of the saved weights.
        progress: shows the measurement.

    Raises:
        BudgetError: not even the largest sparsity that the allocation allows is so fast.
        RecipeError: the dense layers are not alike, so that one of them cannot stand for all.
    """
    progress = progress or SilentProgress()
    if len(set(dense_shapes(config, spec))) > 1:
        raise RecipeError(
            "a speedup as the budget is measured on one layer for all, but the layers of this model have different "
            "sizes before pruning; give --sparsity instead."
        )
    curve = measure_curve(config, spec, method, speedup_of, placement, progress)
    sparsity = curve.sparsity_for(speedup)
    best, most = curve.best_speedup, curve.sparsities[-1]
    if sparsity is None:
        raise BudgetError(
            f"a {speedup_of} {speedup:g} times as fast cannot be reached on this machine: at sparsity {most:.2f}, the "
            f"most that allocation.max_site_sparsity allows, it is about {best:.2f} times as fast; lower "
            "--target-speedup or give --sparsity."
        )
    chosen = min(math.ceil(sparsity * 10_000) / 10_000, _most(method))
    progress.note(
        f"{speedup_of} {speedup:g} times as fast: sparsity {chosen:g}, from {len(curve.sparsities)} layer shapes "
        f"measured on {placement.device.type}; at sparsity {most:.2f} it would be about {best:.2f} times as fast"
    )
    return chosen


def _most(method: BlockwiseOptions) -> float:
    return min(method.allocation.max_site_sparsity, MAX_SPARSITY - 0.01)


def measure_curve(
    config: Any, spec: FamilySpec, method: BlockwiseOptions, speedup_of: str, placement: Placement, progress: Progress
) -> SpeedCurve:
    """Time layers of typical shapes and the rest of the model, in turns, and return the time of the whole model.

    Args:
        config: stock config of the dense model.
        spec: its family.
        method: decides the shapes.
        speedup_of: "decode" or "prefill".
        placement: device and dtype.
        progress: shows the repetitions.

    Raises:
        RecipeError: the model has no positions for a prompt and a few tokens.
    """
    length = KV_LENGTH if spec.rope else min(KV_LENGTH, config.max_position_embeddings - _STEPS)
    if length < 1:
        raise RecipeError(f"the model has only {config.max_position_embeddings} positions; give --sparsity instead.")
    host = LayerHost(one_layer_model(config, placement), spec.layers, placement)
    candidates = _candidates(host, spec, method)
    clock = _Decode(host, length) if speedup_of == "decode" else _Prefill(host, length)
    sparsities = sorted(candidates)
    seconds: dict[float, list[float]] = {sparsity: [] for sparsity in sparsities}
    rest: list[float] = []
    with progress.step("measuring layers", (_REPETITIONS + 1) * len(sparsities)) as advance:
        for _ in range(_REPETITIONS + 1):
            rest.append(clock.rest())
            for sparsity in sparsities:
                seconds[sparsity].append(clock.layer(candidates[sparsity]))
                advance(1)
    # The first repetition warms up and is not counted.
    outside = statistics.median(rest[1:])
    layers = [statistics.median(seconds[sparsity][1:]) for sparsity in sparsities]
    return SpeedCurve.fit(sparsities, [outside + config.num_hidden_layers * layer for layer in layers])


def _candidates(host: LayerHost, spec: FamilySpec, method: BlockwiseOptions) -> dict[float, nn.Module]:
    """Return layers with random weights by the sparsity that they really have; the one at 0 is the stock layer."""
    (stock,) = host.layers
    hidden_size = host.config.hidden_size
    dense = dense_shape(host.config, spec)
    total = spec.num_parameters(dense, hidden_size)
    found = {0.0: stock}
    for knot in range(1, _KNOTS):
        shape = typical_shape(dense, spec, hidden_size, _most(method) * knot / (_KNOTS - 1), method)
        sparsity = 1 - spec.num_parameters(shape, hidden_size) / total
        if sparsity not in found:
            layer = copy.deepcopy(stock)
            apply_layer_shape(layer, host.config, spec, 0, shape)
            with torch.random.fork_rng(devices=[]):
                for parameter in layer.parameters():
                    nn.init.normal_(parameter, std=0.02)
            found[sparsity] = layer.eval().requires_grad_(False)
    return found


class _Prefill:
    """Times a prompt of one sequence through a layer, and through the rest of the model."""

    def __init__(self, host: LayerHost, length: int) -> None:
        self._host = host
        self._prompt = host.tokens(1, length)

    def layer(self, layer: nn.Module) -> float:
        return self._host.layer_seconds(0, layer, self._prompt, self._host.empty_cache())

    def rest(self) -> float:
        return self._host.rest_seconds(self._prompt, self._host.empty_cache())


class _Decode:
    """Times single tokens of one sequence after a cache that is filled once for each layer."""

    def __init__(self, host: LayerHost, length: int) -> None:
        self._host = host
        self._prompt = host.tokens(1, length)
        self._caches: dict[nn.Module, Any] = {}
        self._rest: Any = host.empty_cache()
        host.rest_seconds(self._prompt, self._rest)

    def layer(self, layer: nn.Module) -> float:
        if layer not in self._caches:
            self._caches[layer] = self._host.empty_cache()
            self._host.layer_seconds(0, layer, self._prompt, self._caches[layer])
        return self._host.step_seconds(0, layer, self._caches[layer], 1, _STEPS)

    def rest(self) -> float:
        cache, token = copy.deepcopy(self._rest), self._host.tokens(1, 1)
        return statistics.median(self._host.rest_seconds(token, cache) for _ in range(_STEPS))
