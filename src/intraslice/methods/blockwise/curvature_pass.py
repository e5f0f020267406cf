"""What removing a unit costs the loss, to second order, and the removal in shots: LLM-Surgeon.

The curvature of the loss in the weights of an output projection is approximated by the Kronecker product of A, the
second moment of its inputs, and G, that of the gradients at its outputs. G comes from a backward pass (D^2 numbers of
four bytes for each site, on the CPU), A from a forward pass after it, layer by layer, because it may be large.

Between two shots the model keeps its shape: what is gone has zeros in the output projections, which are the only
weights that change. They are in a file of the work folder, and layers are loaded with them, so that the next shot
measures the model that the last one has left, one layer in memory. The last shot is the prune itself.

Shapes: B sequences of a batch, T tokens, D outputs of a site, C inputs of its output projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from intraslice.algebra.statistics import Statistics
from intraslice.checkpoint.tensorfile import TensorFile, TensorSlot, check_sealed, read_tensor
from intraslice.errors import CheckpointError, NumericalError
from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.sites import ATTENTION, Site
from intraslice.methods.base import Context
from intraslice.methods.blockwise.allocators.base import SPREAD, count_units
from intraslice.methods.blockwise.allocators.curvature import allocate_by_curvature
from intraslice.methods.blockwise.options import AttentionOptions, BlockwiseOptions, FFNOptions
from intraslice.methods.blockwise.scores import removal_costs, without_channels
from intraslice.methods.blockwise.weight_gradients import UnitScores
from intraslice.streaming.backward import backward_pass, passes
from intraslice.streaming.model import StreamedModel

SHOTS_VERSION = 1
"""Part of what the file of output projections is sealed for: raise it when what is measured, or its form, changes."""

OUTPUTS_FILE = "outputs.safetensors"
"""In the work folder: the output projections of all layers after the shots that are done."""


def costs_in_shots(context: Context, options: BlockwiseOptions, measured: str) -> tuple[UnitScores, ...]:
    """Remove units in all shots but the last one; return what each unit costs in the model that they leave.

    Shot t of T takes the units of least cost per weight until t / T of the sparsity is reached, and lets the other
    channels of their sites make up for them. Afterwards the model is loaded with the weights that this leaves.

    Args:
        context: of the run.
        options: of the method.
        measured: digest of everything that decides the result.

    Raises:
        BudgetError: the sparsity cannot be reached under the cap.
        NumericalError: activations or gradients are NaN or infinite, or a system cannot be solved.
        OutputError: the work folder has no room for the output projections.
    """
    shots, path = options.allocation.shots, context.folder / OUTPUTS_FILE
    units = count_units(context.model.sites, context.sparsity, options.allocation)
    for shot in range(_shots_done(context, path, measured), shots - 1):
        name = f"shot {shot + 1} of {shots}"
        costs = unit_costs(context, options, name)
        sparsity = units.sparsity * (shot + 1) / shots
        keep = allocate_by_curvature(costs, units.sites, sparsity, options.allocation).keep
        _remove(context, options, costs, keep, _Shot(path=path, measured=measured, done=shot + 1, name=name))
        context.model.change_weights(partial(_read_outputs, context.model, path))
    return unit_costs(context, options, f"shot {shots} of {shots}" if shots > 1 else "")


def go_on_after_shots(context: Context, measured: str) -> None:
    """Let the model be loaded as the shots have left it, in a run that did not fire them itself, too.

    Raises:
        CheckpointError: their file is not what was written.
    """
    path = context.folder / OUTPUTS_FILE
    try:
        check_sealed(path, measured)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; pass --overwrite to start again.") from error
    context.model.change_weights(partial(_read_outputs, context.model, path))


def unit_costs(context: Context, options: BlockwiseOptions, name: str = "") -> tuple[UnitScores, ...]:
    """Return for each layer what removing each of its heads and channels costs, as `removal_costs` has it.

    Args:
        context: of the run.
        options: of the method.
        name: of the shot, for the progress; "" for the only one.

    Raises:
        NumericalError: activations or gradients are NaN or infinite, or a second moment cannot be inverted.
    """
    gradients = _gradient_moments(context, name)
    costs: list[UnitScores] = []
    for index, layer, moments in _input_moments(context, _titled("costs", name)):
        found: UnitScores = {}
        for site in context.model.sites.layers[index]:
            weight = layer.output_projection(site.name).weight.detach().cpu()
            gradient = gradients[index].of(site.name).value
            damping = _options_of(site, options).obs_damping
            with _naming(index):
                of_units = removal_costs(moments[site.name], gradient, weight, site.units, damping)
            found[site.name] = tuple(of_units.tolist())
        costs.append(found)
    return tuple(costs)


def _titled(what: str, name: str) -> str:
    return f"{what}, {name}" if name else what


def _options_of(site: Site, options: BlockwiseOptions) -> AttentionOptions | FFNOptions:
    return options.attention if site.kind == ATTENTION else options.ffn


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Say which layer an error is about."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"layer {index}: {error}") from error


def _gradient_moments(context: Context, name: str) -> list[Statistics]:
    """Return the second moments over the tokens of the gradients at the output of each output projection, [D, D]."""
    model = context.model
    sums = [Statistics(torch.device("cpu"), torch.float32) for _ in range(model.num_layers)]
    for index, (statistics, sites) in enumerate(zip(sums, model.sites.layers, strict=True)):
        sizes = model.spec.linear_sizes(model.dense_shapes[index], model.config.hidden_size)
        for site in sites:
            outputs, _ = sizes[site.writes]
            statistics.sum(site.name, outputs, outputs)

    def step(index: int, layer: DecoderLayer, hidden: Tensor, gradient: Tensor) -> Tensor:
        names = [site.name for site in model.sites.layers[index]]
        return _backward(layer, hidden, gradient, names, sums[index])

    tokens, boundary_bytes = context.tokens, context.run.boundary_bytes
    with context.progress.step(_titled("curvature", name), total=passes(model, tokens)) as advance:
        backward_pass(model, tokens, step, boundary_bytes=boundary_bytes, advance=advance)
    for index, statistics in enumerate(sums):
        if not all(bool(torch.isfinite(moment).all()) for moment in statistics.finish().values()):
            raise NumericalError(f"the gradients at the outputs of layer {index} are NaN or infinite.")
    return sums


def _backward(
    layer: DecoderLayer, hidden_BTD: Tensor, gradient_BTD: Tensor, names: Sequence[str], sums: Statistics
) -> Tensor:
    """Add the gradients at the outputs of the output projections to the sums; return that of the input, [B, T, D]."""
    outputs: dict[str, Tensor] = {}

    def keep(site: str, module: torch.nn.Module, given: object, output: Tensor) -> None:
        outputs[site] = output

    hooks = [layer.output_projection(name).register_forward_hook(partial(keep, name)) for name in names]
    try:
        with torch.enable_grad():
            hidden = hidden_BTD.detach().requires_grad_(True)
            output, _ = layer.run(hidden)
            at_input, *at_outputs = torch.autograd.grad(
                output, (hidden, *(outputs[name] for name in names)), gradient_BTD
            )
    finally:
        for hook in hooks:
            hook.remove()
    for name, gradient in zip(names, at_outputs, strict=True):
        rows = gradient.flatten(0, 1).float()
        sums.of(name).update((rows.T @ rows).cpu())
    return at_input


def _input_moments(context: Context, name: str) -> Iterator[tuple[int, DecoderLayer, dict[str, Tensor]]]:
    """Yield each layer with the second moments of the inputs of its output projections, [C, C] float64, by site."""
    model, hidden = context.model, context.embedded()
    with context.progress.step(name, total=model.num_layers) as advance:
        for index in range(model.num_layers):
            layer = model.load_layer(index)
            statistics = Statistics(model.placement.stat_device, model.placement.stat_dtype)
            for site in model.sites.layers[index]:
                statistics.second_moment(site.name, layer.output_projection(site.name).in_features)
            for part in hidden.slices():
                with torch.no_grad():
                    output, taps = layer.run(hidden.read(part))
                for site, tap in taps.items():
                    statistics.of(site).update(tap.flatten(0, 1))
                hidden.write(part, output)
            yield index, layer, statistics.finish()
            advance(1)
    context.release()


@dataclass(frozen=True, kw_only=True)
class _Shot:
    """A shot that writes a file.

    Attributes:
        path: of the file; that of the shot before is read until this one is whole.
        measured: what it is sealed for.
        done: shots that are done with it.
        name: for the progress.
    """

    path: Path
    measured: str
    done: int
    name: str


def _remove(
    context: Context,
    options: BlockwiseOptions,
    costs: Sequence[Mapping[str, Sequence[float]]],
    keep: Sequence[Mapping[str, float]],
    shot: _Shot,
) -> None:
    """Write the output projections of all layers without the units of least cost."""
    model = context.model
    dtype = model.placement.compute_dtype
    slots = {"done": TensorSlot(torch.float64, ())}
    for index, sites in enumerate(model.sites.layers):
        sizes = model.spec.linear_sizes(model.dense_shapes[index], model.config.hidden_size)
        slots |= {f"{index}.{site.writes}": TensorSlot(dtype, sizes[site.writes]) for site in sites}
    with TensorFile(shot.path, slots, sealed_for=shot.measured) as file:
        file.write("done", torch.tensor(shot.done, dtype=torch.float64))
        for index, layer, moments in _input_moments(context, _titled("removal", shot.name)):
            for site in model.sites.layers[index]:
                weight = layer.output_projection(site.name).weight.detach().cpu()
                gone = units_to_remove(costs[index][site.name], keep[index][site.name], weight)
                channels = gone.repeat_interleave(weight.shape[1] // site.units)
                if gone.any():
                    damping = _options_of(site, options).obs_damping
                    with _naming(index):
                        weight = without_channels(moments[site.name], weight, channels, damping)
                file.write(f"{index}.{site.writes}", weight.to(dtype))


def units_to_remove(costs: Sequence[float], kept: float, weight_DC: Tensor) -> Tensor:
    """Return which units go, bool [units]: those of least cost, and all that are gone already; never all units.

    Args:
        costs: of the units.
        kept: share of the units that stays; the number that goes is rounded down, because later shots may take more.
        weight_DC: the output projection; what is gone has zeros in it.
    """
    units = len(costs)
    dead = int((weight_DC.T.reshape(units, -1) == 0).all(1).sum())
    count = max(dead, min(math.floor((1.0 - kept) * units + SPREAD), units - 1))
    gone = torch.zeros(units, dtype=torch.bool)
    gone[torch.tensor(costs, dtype=torch.float64).argsort(stable=True)[:count]] = True
    return gone


def _read_outputs(model: StreamedModel, path: Path, index: int) -> dict[str, Tensor]:
    """Return the output projections of a layer, by name within the layer."""
    return {f"{site.writes}.weight": read_tensor(path, f"{index}.{site.writes}") for site in model.sites.layers[index]}


def _shots_done(context: Context, path: Path, measured: str) -> int:
    """Return how many shots an interrupted run has fired, and go on with what they have left."""
    if not path.exists():
        return 0
    try:
        check_sealed(path, measured)
    except CheckpointError as error:
        context.progress.note(f"{error}; the shots are fired again")
        return 0
    context.model.change_weights(partial(_read_outputs, context.model, path))
    return int(read_tensor(path, "done"))
