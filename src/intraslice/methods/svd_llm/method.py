"""SVD-LLM (arXiv 2403.07378), layer by layer: each weight becomes two low-rank factors that fit the inputs it gets.

Shapes: C inputs of a Linear, r rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from intraslice.algebra.statistics import SecondMoment, Statistics
from intraslice.errors import NumericalError
from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.sites import ATTENTION, FFN
from intraslice.layers.surgery import write_factors
from intraslice.methods.base import Context, FinishedLayers, LayerOutcome, Outside, Preview
from intraslice.methods.svd_llm.algebra import Ranks, factor_weight, plan_ranks, square_root
from intraslice.methods.svd_llm.options import SvdLlmOptions
from intraslice.placement import Placement, for_float64
from intraslice.streaming.hidden import HiddenStates
from intraslice.streaming.propagate import propagate_layer


class SvdLlm:
    """Each weight of a layer as two factors of a rank that meets the budget.

    Args:
        options: which inputs the factors fit.
    """

    resumes = True

    def __init__(self, options: SvdLlmOptions) -> None:
        self._options = options
        self._ranks: list[Ranks] = []
        self._follows_dense = options.factors.measured_on == "dense_stream"

    def preview(self, dense: Any, sparsity: float) -> Preview:
        """There is nothing to say besides the sparsity."""
        return Preview()

    def plan(self, context: Context) -> dict[str, Any]:
        """Return the ranks of all layers.

        Raises:
            BudgetError: the weights are too small to come close to the budget.
        """
        model = context.model
        sizes = [model.spec.linear_sizes(shape, model.config.hidden_size) for shape in model.dense_shapes]
        return {"ranks": plan_ranks(sizes, context.sparsity)}

    def plan_seconds(self, context: Context) -> float:
        """Return 0: nothing is measured."""
        return 0.0

    def open(self, context: Context, plan: dict[str, Any], carry: Any) -> HiddenStates:
        """Return the hidden states at the input of the first layer."""
        self._ranks = [tuple((path, rank) for path, rank in layer) for layer in plan["ranks"]]
        return context.embedded()

    def layer(self, context: Context, state: HiddenStates, index: int, layer: DecoderLayer) -> LayerOutcome:
        """Factor the weights of the layer in place, and advance the states through it."""
        model, ranks = context.model, self._ranks[index]
        errors = _factor_layer(context.placement, layer, index, ranks, state, self._follows_dense)
        shape = replace(model.dense_shapes[index], ranks=ranks)
        return LayerOutcome(
            shape=shape,
            num_weights=model.spec.num_parameters(shape, model.config.hidden_size),
            errors=errors,
            heads=tuple(range(shape.num_attention_heads)),
        )

    def replay(self, context: Context, state: HiddenStates, index: int, layer: DecoderLayer) -> None:
        """Advance the states through a finished layer, or through what it was in the dense model."""
        propagate_layer(context.model.load_layer(index) if self._follows_dense else layer, state)

    def tune(self, context: Context, layers: FinishedLayers) -> None:
        """Train nothing: the method is its closed form."""

    def finish(self, context: Context, state: HiddenStates, outside: dict[str, Tensor]) -> Outside:
        """Return what is stored outside of the decoder layers: what the dense model has."""
        return Outside(tensors=outside)


@torch.no_grad()
def _factor_layer(
    placement: Placement, layer: DecoderLayer, index: int, ranks: Ranks, hidden: HiddenStates, follows_dense: bool
) -> dict[str, float]:
    """Factor the weights of a layer, advance the states through it, return the errors of its sites.

    The states follow the factored layer, or with `follows_dense` what it was; errors are those on the same states.
    """
    dense = copy.deepcopy(layer)
    followed = dense if follows_dense else layer

    def context(states: Tensor) -> tuple[Tensor, Tensor]:
        reads = layer.attention_input(states)
        return reads, layer.context(layer.attention, reads)

    def act(states: Tensor) -> tuple[Tensor, Tensor]:
        reads = layer.ffn_input(states)
        return reads, layer.act(reads)

    try:
        _factor_weights(placement, layer, layer.spec.attention_paths, ranks, hidden, context)
        attention_error = _advance(
            hidden,
            lambda states: dense.attention_output(dense.attention, states),
            lambda states: layer.attention_output(layer.attention, states),
            followed.before_ffn,
            follows_dense,
        )
        _factor_weights(placement, layer, layer.spec.ffn_paths, ranks, hidden, act)

        def add_ffn(states: Tensor, output: Tensor) -> Tensor:
            return followed.add_ffn(followed.ffn_residual(states), output)

        ffn_error = _advance(hidden, dense.ffn_output, layer.ffn_output, add_ffn, follows_dense)
    except NumericalError as error:
        raise NumericalError(f"layer {index}: {error}") from error
    return {ATTENTION: attention_error, FFN: ffn_error}


def _factor_weights(
    placement: Placement,
    layer: DecoderLayer,
    paths: tuple[Sequence[str], str],
    ranks: Ranks,
    hidden: HiddenStates,
    inputs: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Factor the Linears of one site, `paths`: those that read its input, and the one that writes its output.

    `inputs` gives what the two read, of the hidden states before the site.
    """
    reading, writing = paths
    by_input = (reading, (writing,))
    moments = [
        SecondMoment(_linear(layer, group[0]).in_features, None, placement.stat_device, placement.stat_dtype)
        for group in by_input
    ]
    for part in hidden.slices():
        for moment, values in zip(moments, inputs(hidden.read(part)), strict=True):
            moment.update(values.flatten(0, 1))
    wanted = dict(ranks)
    for group, moment in zip(by_input, moments, strict=True):
        if not torch.isfinite(moment.value).all():
            raise NumericalError("the activations contain NaN or infinite values.")
        root = square_root(moment.value)
        for path in group:
            if path in wanted:
                weight = _linear(layer, path).weight.detach().to("cpu").to(root.dtype)
                first, second = factor_weight(weight, root, wanted[path])
                write_factors(layer, path, first, second, placement.save_dtype)


def _linear(layer: DecoderLayer, path: str) -> nn.Linear:
    linear = layer.module.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def _advance(
    hidden: HiddenStates,
    dense: Callable[[Tensor], Tensor],
    factored: Callable[[Tensor], Tensor],
    add: Callable[[Tensor, Tensor], Tensor],
    follows_dense: bool,
) -> float:
    """Advance the states through a site; return the relative squared error of its factors against the dense one."""
    statistics = Statistics(torch.device("cpu"), torch.float64)
    error, energy = statistics.number("error"), statistics.number("energy")
    for part in hidden.slices():
        states = hidden.read(part)
        target, output = dense(states), factored(states)
        error.update(float(for_float64((target - output).float().square()).sum(dtype=torch.float64)))
        energy.update(float(for_float64(target.float().square()).sum(dtype=torch.float64)))
        hidden.write(part, add(states, target if follows_dense else output))
    sums = statistics.finish()
    return float(sums["error"]) / max(float(sums["energy"]), 1e-300)
