"""A search over how much each site loses, by what the predictions of the whole pruned model lose.

In each round every site is pruned at several losses around where it stands, on the stream that the sites before it
leave at theirs; what comes out is kept on disk. Then an evolutionary search puts models together from these levels and
keeps those whose predictions are nearest to the dense model's. The next round begins at the best of them, with half
the spacing. Models run side by side, layer by layer; as long as two have the same levels they are one.

Shapes: S sequences, T tokens, D hidden_size.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from intraslice.checkpoint.tensorfile import read_sealed, read_tensors, write_tensors
from intraslice.errors import CheckpointError
from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.sites import ATTENTION, FFN, Site
from intraslice.methods.blockwise.allocators.search import (
    Ladder,
    Levels,
    groups_of,
    kept_on,
    ladders_of,
    offspring,
)
from intraslice.methods.blockwise.options import BlockwiseOptions
from intraslice.methods.blockwise.predictions import mean_divergences, split_tokens
from intraslice.methods.blockwise.trials import for_trials, prune_alone
from intraslice.progress import Progress
from intraslice.runtime.families_intraslice import LayerShape
from intraslice.streaming.hidden import HiddenStates, embedded_states
from intraslice.streaming.model import StreamedModel
from intraslice.streaming.propagate import propagate_layer

SEARCH_VERSION = 1
"""Part of what a kept search is named by: raise it when what is found, or the form of the file, changes."""

FIT_TOKENS = 16384
"""How many tokens, in whole batches, the levels are fitted to."""

JUDGE_TOKENS = 8192
"""How many other tokens the models of the search are compared on."""

PARENTS = 2
"""How many models survive a generation."""

FIRST_LOOK = 4
"""A generation is judged on the first batch, and what is left of it, one in so many, on all that judge."""

Keep = tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class SearchRun:
    """What a search needs besides the model and the settings.

    Attributes:
        boundary_bytes: memory for the states of the models that run side by side.
        save_path: file that holds what was found, written after each round.
        folder: of the levels; another one that an interrupted run left there goes.
        measured: digest of everything that decides it; what was found for something else is not taken.
        progress: shows layers and generations.
    """

    boundary_bytes: int
    save_path: Path
    folder: Path
    measured: str
    progress: Progress


@torch.no_grad()
def search_levels(
    model: StreamedModel, tokens_ST: Tensor, begin: Callable[[], Keep], options: BlockwiseOptions, run: SearchRun
) -> Keep:
    """Return what each site keeps, for each layer by the name of the site.

    Args:
        model: the streamed dense model.
        tokens_ST: calibration token ids, [S, T].
        begin: says what each site keeps at first; asked only when no round is kept on disk.
        options: of the method.
        run: where and how.

    Raises:
        NumericalError: activations or logits are NaN or infinite.
    """
    rules = options.allocation
    done, seconds, kept = _read(run, model)
    keep = begin() if kept is None else kept
    if done == rules.search_rounds:
        return keep
    fit, judging = split_tokens(tokens_ST, model.batch_shape[0], fit=FIT_TOKENS, judge=JUDGE_TOKENS)
    with _emptied(run.folder):
        store = _Store(model, run.folder)
        judge = _Judge(store, judging, run.boundary_bytes)
        for number in range(done, rules.search_rounds):
            started = time.monotonic()
            name = f"round {number + 1} of {rules.search_rounds}"
            ladders = ladders_of(model.sites, keep, rules.search_spacing / 2**number, rules)
            store.fill(fit, ladders, for_trials(options), name, run.progress)
            keep = kept_on(model.sites, ladders, _evolve(judge, ladders, name, run.progress, options))
            seconds += time.monotonic() - started
            _write(run, number + 1, seconds, keep)
    return keep


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """Begin and end without a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(run: SearchRun, model: StreamedModel) -> tuple[int, float, Keep | None]:
    """Return the finished rounds, what they took, and what they have found."""
    if not run.save_path.exists():
        return 0, 0.0, None
    try:
        tensors = read_sealed(run.save_path, run.measured)
    except CheckpointError as error:
        run.progress.note(f"{error}; the search begins again")
        return 0, 0.0, None
    keep = tuple(
        {site.name: float(tensors[f"{layer}.{site.name}"]) for site in of_layer}
        for layer, of_layer in enumerate(model.sites.layers)
    )
    return int(tensors["done"]), float(tensors["seconds"]), keep


def _write(run: SearchRun, done: int, seconds: float, keep: Keep) -> None:
    numbers = {"done": float(done), "seconds": seconds}
    numbers |= {f"{layer}.{name}": kept for layer, of_layer in enumerate(keep) for name, kept in of_layer.items()}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    write_tensors(run.save_path, tensors, sealed_for=run.measured)


class _Store:
    """The levels of all sites, in files: what a site was pruned to at each of its losses.

    Args:
        model: the streamed dense model.
        folder: of the files.
    """

    def __init__(self, model: StreamedModel, folder: Path) -> None:
        self.model = model
        self._folder = folder
        self._shapes: dict[tuple[int, str, int], LayerShape] = {}

    def fill(
        self, tokens_ST: Tensor, ladders: Sequence[Ladder], options: BlockwiseOptions, name: str, progress: Progress
    ) -> None:
        """Prune every site at each of its losses; what was kept before goes."""
        model = self.model
        self._shapes.clear()
        fit = embedded_states(model, tokens_ST, None)
        of_site = iter(ladders)
        with progress.step(f"levels, {name}", total=model.num_layers) as advance:
            for index, sites in enumerate(model.sites.layers):
                layer = model.load_layer(index)
                for site in sites:
                    losses = next(of_site)
                    trials = prune_alone(model, layer, index, site, list(losses.values()), fit, options)
                    for level, trial in zip(losses, trials, strict=True):
                        self._keep(index, site, level, trial)
                        if level == 0 and site.kind == ATTENTION:
                            # The FFN is measured behind it.
                            layer = trial
                propagate_layer(self.layer(index, {site.name: 0 for site in sites}), fit)
                advance(1)

    def _keep(self, index: int, site: Site, number: int, trial: DecoderLayer) -> None:
        own = self._names(site.kind)
        tensors = {name: tensor for name, tensor in self.model.stored_tensors(trial).items() if own(name)}
        write_tensors(self._file(index, site.name, number), tensors)
        self._shapes[index, site.name, number] = trial.shape

    def _names(self, kind: str) -> Callable[[str], bool]:
        """Return what says whether a tensor of a layer belongs to the FFN, or with attention to the rest."""
        reading, output = self.model.spec.ffn_paths
        prefixes = tuple(f"{path}." for path in (*reading, output))
        return lambda name: name.startswith(prefixes) == (kind == FFN)

    def _file(self, index: int, site: str, number: int) -> Path:
        return self._folder / f"{index}.{site}.{number}.safetensors"

    def layer(self, index: int, levels: Mapping[str, int]) -> DecoderLayer:
        """Return a layer whose sites stand on some of their levels, by the name of the site."""
        spec = self.model.spec
        tensors: dict[str, Tensor] = {}
        shape = self.model.dense_shapes[index]
        biased = shape.output_bias
        for site in self.model.sites.layers[index]:
            number = levels[site.name]
            tensors |= read_tensors(self._file(index, site.name, number))
            own = self._shapes[index, site.name, number]
            biased |= own.output_bias
            whole = replace(own, intermediate_size=shape.intermediate_size)
            shape = whole if site.kind == ATTENTION else replace(shape, intermediate_size=own.intermediate_size)
        shape = replace(shape, output_bias=biased)
        if biased:
            # A repair that adds a bias gives it to both; where one of them is whole, its bias is zero.
            for path in (spec.attention_paths[1], spec.ffn_paths[1]):
                weight = tensors[f"{path}.weight"]
                tensors.setdefault(f"{path}.bias", weight.new_zeros(len(weight)))
        return self.model.load_pruned_layer(index, shape, tensors)


class _Judge:
    """Says how far the predictions of models from a store are from those of the dense model.

    Args:
        store: the levels.
        tokens_ST: what is predicted.
        boundary_bytes: memory for the states of the models that run side by side.
    """

    def __init__(self, store: _Store, tokens_ST: Tensor, boundary_bytes: int) -> None:
        self._store, self._tokens = store, tokens_ST
        self._model = store.model
        self.sites = store.model.sites
        self.batches = -(-len(tokens_ST) // self._model.batch_shape[0])
        width = self._model.config.hidden_size * self._model.placement.compute_dtype.itemsize
        self._most = max(1, boundary_bytes // (tokens_ST.numel() * width))
        self._reference = embedded_states(self._model, tokens_ST, None)
        for index in range(self._model.num_layers):
            propagate_layer(self._model.load_layer(index), self._reference)

    def divergences(self, models: Sequence[Levels], batches: int) -> list[float]:
        """Return the mean KL divergence of each model from the dense one on the first batches, in nats per token."""
        found: list[float] = []
        for start in range(0, len(models), self._most):
            found += self._wave(models[start : start + self._most], batches)
        return found

    def _wave(self, models: Sequence[Levels], batches: int) -> list[float]:
        model = self._model
        count = min(batches * model.batch_shape[0], len(self._tokens))
        tokens = self._tokens[:count]
        # Models that have been the same so far share their states.
        running: list[tuple[HiddenStates, list[int]]] = [
            (embedded_states(model, tokens, None), list(range(len(models))))
        ]
        first = 0
        for index, sites in enumerate(model.sites.layers):
            after: list[tuple[HiddenStates, list[int]]] = []
            layers: dict[Levels, DecoderLayer] = {}
            for states, members in running:
                parts: dict[Levels, list[int]] = {}
                for member in members:
                    parts.setdefault(models[member][first : first + len(sites)], []).append(member)
                copies = [states, *(states.clone() for _ in range(len(parts) - 1))]
                for (levels, own), copy in zip(parts.items(), copies, strict=True):
                    if levels not in layers:
                        names = (site.name for site in sites)
                        layers[levels] = self._store.layer(index, dict(zip(names, levels, strict=True)))
                    propagate_layer(layers[levels], copy)
                    after.append((copy, own))
            running, first = after, first + len(sites)
        reference = self._reference.first(count)
        found = mean_divergences(model, tokens, reference, [states for states, _ in running])
        values = [0.0] * len(models)
        for divergence, (_, members) in zip(found, running, strict=True):
            for member in members:
                values[member] = divergence
        return values


def _evolve(
    judge: _Judge, ladders: Sequence[Ladder], name: str, progress: Progress, options: BlockwiseOptions
) -> Levels:
    """Return the best model that was found; where all sites stand is the first."""
    rules = options.allocation
    groups = groups_of(judge.sites, rules.search_moves)
    draw = random.Random(name)
    start: Levels = (0,) * len(ladders)
    parents, first = [start], None
    scores: dict[Levels, float] = {}
    with progress.step(f"search, {name}", total=rules.search_generations) as advance:
        for _ in range(rules.search_generations):
            # Drawn by turns from each parent; the same one twice is one.
            drawn = [offspring(parents[n % len(parents)], ladders, groups, draw) for n in range(rules.search_offspring)]
            models = list(dict.fromkeys([*parents, *drawn]))
            if judge.batches > 1:
                looks = dict(zip(models, judge.divergences(models, 1), strict=True))
                models = sorted(models, key=looks.__getitem__)[: max(PARENTS, -(-len(models) // FIRST_LOOK))]
                # The best so far is never lost to a first look.
                models = list(dict.fromkeys([*parents, *models]))
            new = [one for one in models if one not in scores]
            scores |= dict(zip(new, judge.divergences(new, judge.batches), strict=True))
            first = scores[start] if first is None else first
            parents = sorted(models, key=scores.__getitem__)[:PARENTS]
            advance(1)
    best = parents[0]
    progress.note(f"search, {name}: KL divergence {first:.4f} -> {scores[best]:.4f} on the text that judges")
    return best
