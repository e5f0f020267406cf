"""What each site's loss costs: the site is pruned alone, in a dense model, and the predictions are compared.

A wave of layers is pruned site by site, each at several losses; what comes out runs on through the dense layers above,
all of it side by side, so that each layer is loaded once for a wave. A wave is as wide as `boundary_bytes` allows.

Shapes: B sequences of a batch, T tokens, D hidden_size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from intraslice.checkpoint.tensorfile import read_sealed, write_tensors
from intraslice.errors import CheckpointError
from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.sites import ATTENTION
from intraslice.methods.blockwise.allocators.divergence import SiteDivergences
from intraslice.methods.blockwise.layer import attention_cost
from intraslice.methods.blockwise.options import BlockwiseOptions
from intraslice.methods.blockwise.predictions import mean_divergences, split_tokens
from intraslice.methods.blockwise.trials import for_trials, prune_alone
from intraslice.progress import Progress
from intraslice.streaming.hidden import HiddenStates, embedded_states
from intraslice.streaming.model import StreamedModel
from intraslice.streaming.propagate import propagate_layer

FIT_TOKENS = 16384
"""How many tokens, in whole batches, the pruned sites are fitted to."""

DIVERGENCE_VERSION = 1
"""Part of what a kept measurement is named by: raise it when what is measured, or the form of the file, changes."""

JUDGE_TOKENS = 2048
"""How many other tokens the predictions are compared on."""

_LOSSES = (0.7, 2.0)
"""What a site loses when it is tried, times the sparsity of the model. No site is given a loss beyond the last one:
costs grow faster than any curve through smaller losses says."""


@dataclass
class _Branch:
    """A model in which one site is pruned: where the states of its tokens are now."""

    layer: int
    site: str
    lost: float
    states: HiddenStates


@torch.no_grad()
def measure_divergences(
    model: StreamedModel,
    tokens_ST: Tensor,
    sparsity: float,
    options: BlockwiseOptions,
    *,
    boundary_bytes: int,
    save_path: Path,
    measured: str = "",
    progress: Progress,
) -> SiteDivergences:
    """Return what some losses of each site cost.

    Sites are repaired against their own output: in a dense model there is no drift to repair.

    Args:
        model: the streamed dense model.
        tokens_ST: calibration token ids, [S, T].
        sparsity: around which losses are tried.
        options: how a site is pruned.
        boundary_bytes: memory for the states of a wave.
        save_path: file that holds what is measured, written after each wave.
        measured: digest of everything that decides it; measurements of something else are not taken.
        progress: shows the layers.

    Raises:
        NumericalError: activations or logits are NaN or infinite.
    """
    fit_tokens, judge_tokens = split_tokens(tokens_ST, model.batch_shape[0], fit=FIT_TOKENS, judge=JUDGE_TOKENS)
    cap = options.allocation.max_site_sparsity
    losses = sorted({min(sparsity * factor, cap) for factor in _LOSSES})
    alone = for_trials(options)
    layers, costs = model.num_layers, _Costs(save_path, measured, progress)
    if costs.done == layers:
        return costs.all(layers)
    fit, judge = embedded_states(model, fit_tokens, None), embedded_states(model, judge_tokens, None)
    reference = judge.clone()
    states_bytes = judge_tokens.numel() * model.config.hidden_size * model.placement.compute_dtype.itemsize
    wave = max(1, boundary_bytes // (states_bytes * len(losses) * max(map(len, model.sites.layers))))
    starts = range(costs.done, layers, wave)
    total = layers + sum(layers - first for first in starts)
    with progress.step("divergence of each site", total=total) as advance:
        started = time.monotonic()
        for index in range(layers):
            layer = model.load_layer(index)
            for states in (reference, fit, judge) if index < costs.done else (reference,):
                propagate_layer(layer, states)
            advance(1)
        for first in starts:
            stop = min(first + wave, layers)
            branches: list[_Branch] = []
            for index in range(first, layers):
                layer = model.load_layer(index)
                for branch in branches:
                    propagate_layer(layer, branch.states)
                if index < stop:
                    branches += _trials(model, layer, index, fit, judge, losses, alone)
                    propagate_layer(layer, fit)
                    propagate_layer(layer, judge)
                advance(1)
            found = mean_divergences(model, judge_tokens, reference, [branch.states for branch in branches])
            costs.add(branches, found, stop, time.monotonic() - started)
            started = time.monotonic()
    return costs.all(layers)


class _Costs:
    """What has been measured so far; saved after each wave so that an interrupted run goes on from there.

    Args:
        path: file of it; what it holds is taken if it was measured for the same.
        measured: digest of everything that decides it.
        progress: is told when the file cannot be used.
    """

    def __init__(self, path: Path, measured: str, progress: Progress) -> None:
        self._path, self._measured = path, measured
        self._found: dict[tuple[int, str], list[tuple[float, float]]] = {}
        self.done, self.seconds = 0, 0.0
        if not path.exists():
            return
        try:
            tensors = read_sealed(path, measured)
        except CheckpointError as error:
            progress.note(f"{error}; the divergences are measured again")
            return
        self.done, self.seconds = int(tensors.pop("done")), float(tensors.pop("seconds"))
        for name, points in tensors.items():
            layer, _, site = name.partition(".")
            self._found[int(layer), site] = [(float(lost), float(cost)) for lost, cost in points]

    def add(self, branches: Sequence[_Branch], divergences: Sequence[float], done: int, seconds: float) -> None:
        """Add a wave up to layer `done`, and what it has cost; write the file."""
        for branch, divergence in zip(branches, divergences, strict=True):
            self._found.setdefault((branch.layer, branch.site), []).append((branch.lost, divergence))
        self.done = done
        self.seconds += seconds
        points = {
            f"{layer}.{site}": torch.tensor(found, dtype=torch.float64) for (layer, site), found in self._found.items()
        }
        numbers = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("done", "seconds")}
        write_tensors(self._path, {**points, **numbers}, sealed_for=self._measured)

    def all(self, layers: int) -> SiteDivergences:
        """Return the measurements of all layers."""
        costs: list[dict[str, tuple[tuple[float, float], ...]]] = [{} for _ in range(layers)]
        for (layer, site), points in sorted(self._found.items()):
            costs[layer][site] = tuple(sorted(points))
        return SiteDivergences(tuple(costs))


def _trials(
    model: StreamedModel,
    layer: DecoderLayer,
    index: int,
    fit: HiddenStates,
    judge: HiddenStates,
    losses: Sequence[float],
    options: BlockwiseOptions,
) -> list[_Branch]:
    """Prune each site of a dense layer at each loss; return what comes out of the layer."""
    branches = []
    for site in model.sites.layers[index]:
        for trial in prune_alone(model, layer, index, site, losses, fit, options):
            if site.kind == ATTENTION:
                kept = attention_cost(model, trial.shape)
            else:
                kept = trial.shape.intermediate_size * site.unit_weights
            if kept < site.num_weights:
                states = judge.clone()
                propagate_layer(trial, states)
                branches.append(_Branch(index, site.name, 1.0 - kept / site.num_weights, states))
    return branches
