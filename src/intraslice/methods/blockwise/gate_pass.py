"""Learns which directions of heads and which channels of FFNs a model needs: DISP-LLM on the units of this package.

The weights of the model are frozen; what is trained is the network that gives the logits of the gates. A step is one
batch of calibration text: gates are sampled, and the gradient of the loss comes down to them through all layers. These
stay in memory, because hundreds of steps would load each of them as often.

Shapes: S sequences, B sequences of a batch, T tokens, C gates of a site.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from intraslice.checkpoint.tensorfile import read_sealed, write_tensors
from intraslice.errors import CheckpointError, NumericalError, RecipeError
from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.sites import ATTENTION
from intraslice.methods.blockwise.gates import Gate, GateNetwork, sampled_gates, size_penalty
from intraslice.methods.blockwise.gradient_pass import leading_bases
from intraslice.methods.blockwise.options import AllocationOptions
from intraslice.progress import Progress
from intraslice.streaming.backward import backward_pass
from intraslice.streaming.model import StreamedModel

GATES_VERSION = 1
"""Part of what kept gates are named by: raise it when what is learned, or the form of the file, changes."""

_SAVE_EVERY = 20
"""Steps between two savings."""

_DECAY = 0.05
"""Of the weights of the network; as published."""


def learn_gates(
    model: StreamedModel,
    tokens_ST: Tensor,
    sparsity: float,
    options: AllocationOptions,
    *,
    boundary_bytes: int,
    save_path: Path,
    measured: str = "",
    progress: Progress,
) -> tuple[dict[str, Tensor], ...]:
    """Return the logits of the gates of each layer, [C] float64, by the name of the site.

    Attention has a gate for each eigenvector of the context of each head, an FFN one for each channel. What is
    minimised is the mean loss of a token plus gate_penalty log(max(T, p) / min(T, p)), with T the share of the weights
    whose gates are open and p = 1 - sparsity.

    Args:
        model: the streamed dense model.
        tokens_ST: calibration token ids, [S, T].
        sparsity: fraction of the weights whose gates shall be shut.
        options: of the allocation.
        boundary_bytes: memory for the states at the layer boundaries of one batch, at least those of one.
        save_path: file that holds the network, written now and then.
        measured: digest of everything that decides the gates; a network for something else is not taken.
        progress: shows the steps.

    Raises:
        RecipeError: the layers do not fit into memory together.
        NumericalError: the loss or a gradient is NaN or infinite.
    """
    training = _Training(model, options)
    if save_path.exists():
        try:
            training.load(save_path, measured)
        except CheckpointError as error:
            progress.note(f"{error}; the gates are learned again")
    if training.done < options.gate_steps:
        started = time.monotonic()
        gated = GatedModel(model, tokens_ST)
        with progress.step("gates", total=options.gate_steps) as advance:
            advance(training.done)
            while training.done < options.gate_steps:
                _step(gated, training, tokens_ST, 1.0 - sparsity, options.gate_penalty, boundary_bytes)
                if training.done % _SAVE_EVERY == 0 or training.done == options.gate_steps:
                    training.seconds += time.monotonic() - started
                    started = time.monotonic()
                    training.save(save_path, measured)
                advance(1)
    with torch.no_grad():
        logits = iter(training.network())
    return tuple({site.name: next(logits).double() for site in sites} for sites in model.sites.layers)


class _Training:
    """The network that gives the gates, and its optimiser.

    Args:
        model: whose sites have gates.
        options: of the allocation.
    """

    def __init__(self, model: StreamedModel, options: AllocationOptions) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = GateNetwork(gate_counts(model))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=options.gate_rate, weight_decay=_DECAY)
        self.weights = [site.num_weights for sites in model.sites.layers for site in sites]
        self.done, self.seconds = 0, 0.0

    def save(self, path: Path, measured: str) -> None:
        """Write everything that a next step needs."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
        numbers = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("done", "seconds")}
        write_tensors(path, {**tensors, **numbers}, sealed_for=measured)

    def load(self, path: Path, measured: str) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is not what was written, or for something else.
        """
        tensors = read_sealed(path, measured)
        self.done, self.seconds = int(tensors.pop("done")), float(tensors.pop("seconds"))
        state: dict[int, dict[str, Tensor]] = {}
        network: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "network":
                network[rest] = tensor
            else:
                number, _, key = rest.partition(".")
                state.setdefault(int(number), {})[key] = tensor
        self.network.load_state_dict(network)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def gate_counts(model: StreamedModel) -> list[int]:
    """Return the number of gates of each site, layer by layer: channels of what its output projection reads."""
    counts = []
    for sites, shape in zip(model.sites.layers, model.dense_shapes, strict=True):
        sizes = model.spec.linear_sizes(shape, model.config.hidden_size)
        counts += [sizes[site.writes][1] for site in sites]
    return counts


class GatedModel:
    """All layers of a model, with gates.

    Args:
        model: the streamed model.
        tokens_ST: whose first sequences decide the directions of heads.

    Raises:
        RecipeError: the layers do not fit into memory together.
    """

    def __init__(self, model: StreamedModel, tokens_ST: Tensor) -> None:
        placement = model.placement
        needed = model.sites.num_weights * placement.compute_dtype.itemsize
        free = placement.free_bytes()
        if free is not None and needed > free:
            raise RecipeError(
                f"allocation.rule = gates keeps all layers in memory, which take {needed / 1e9:.1f} GB, and only "
                f"{free / 1e9:.1f} GB are free; take another rule, for example mask_gradient, or a larger machine."
            )
        self.model = model
        # FFNs have no directions here: groups of one channel cost nothing.
        groups = max(shape.intermediate_size for shape in model.dense_shapes)
        bases = [found[ATTENTION] for found in leading_bases(model, tokens_ST, groups)]
        self._layers = [model.load_layer(index) for index in range(model.num_layers)]
        self.gates: list[list[Gate]] = []
        for layer, basis, sites in zip(self._layers, bases, model.sites.layers, strict=True):
            placed = basis.to(placement.device, placement.compute_dtype)
            gates = [Gate(placed if site.kind == ATTENTION else None) for site in sites]
            for site, gate in zip(sites, gates, strict=True):
                layer.output_projection(site.name).register_forward_pre_hook(gate)
            self.gates.append(gates)

    def layer(self, index: int) -> DecoderLayer:
        """Return a layer."""
        return self._layers[index]


def gate_gradients(gated: GatedModel, tokens_BT: Tensor, gates: Sequence[Tensor], boundary_bytes: int) -> list[Tensor]:
    """Return the gradients of the mean loss of a token in the gates of each site, [C] float32 each, on the CPU.

    Args:
        gated: the model.
        tokens_BT: token ids of one batch.
        gates: of each site, layer by layer, [C].
        boundary_bytes: memory for the states at the layer boundaries.

    Raises:
        NumericalError: the loss or a gradient is NaN or infinite.
    """
    placement, given = gated.model.placement, iter(gates)
    for of_layer in gated.gates:
        for gate in of_layer:
            values = next(given).detach().to(placement.device, placement.compute_dtype)
            gate.values = values.requires_grad_(True)
    found: dict[int, list[Tensor]] = {}

    def step(index: int, layer: DecoderLayer, hidden: Tensor, gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = hidden.detach().requires_grad_(True)
            output, _ = layer.run(inputs)
            values = [gate.values for gate in gated.gates[index] if gate.values is not None]
            at_input, *found[index] = torch.autograd.grad(output, (inputs, *values), gradient)
        return at_input

    backward_pass(
        gated.model, tokens_BT, step, boundary_bytes=boundary_bytes, advance=lambda passed: None, load=gated.layer
    )
    # The pass adds up the losses of the sequences.
    gradients = [gradient.cpu().float() / len(tokens_BT) for index in sorted(found) for gradient in found[index]]
    if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        raise NumericalError("the gradients of the gates are NaN or infinite.")
    return gradients


def _step(
    gated: GatedModel, training: _Training, tokens_ST: Tensor, kept: float, penalty: float, boundary_bytes: int
) -> None:
    """Sample gates, take the gradient of the loss of the next batch in them, and change the network."""
    batch = gated.model.batch_shape[0]
    start = training.done * batch % len(tokens_ST)
    gates = sampled_gates(training.network(), torch.Generator().manual_seed(training.done))
    gradients = gate_gradients(gated, tokens_ST[start : start + batch], gates, boundary_bytes)
    # The product has the gradient of the loss in the gates.
    loss = torch.stack([(gradient * gate).sum() for gradient, gate in zip(gradients, gates, strict=True)]).sum()
    loss = loss + penalty * size_penalty(gates, training.weights, kept)
    training.optimizer.zero_grad()
    loss.backward()
    training.optimizer.step()
    training.done += 1
