"""Trains all layers of a pruned model together towards the predictions of the dense model, one layer in memory.

What a site loses is repaired by itself, against a target of its own. Which errors matter to the predictions is known
only at the end of the model, so after the last layer some steps of Adam lower the divergence of the predictions on the
calibration sequences. In a step, a batch runs forward through the layers, of which only the inputs are kept; then each
layer is loaded again, last to first, takes the gradient down, and changes its weights on the way. Weights and moments
lie in one file for each layer. Some sequences are held out, also of the repairs before: they decide which weights are
kept, and whether any change.

Shapes: N sequences, B sequences of a batch, T tokens, D hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from intraslice.errors import NumericalError
from intraslice.files import reserve
from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.head import LanguageHead
from intraslice.layers.logit_loss import divergence_sum
from intraslice.layers.sites import Site
from intraslice.methods.base import Context, FinishedLayers
from intraslice.methods.blockwise.distill import BETAS, num_held_out
from intraslice.methods.blockwise.options import TuneOptions
from intraslice.results.result import Tuned
from intraslice.runtime.families_intraslice import LayerShape
from intraslice.streaming.backward import backward_pass
from intraslice.streaming.hidden import HiddenStates
from intraslice.streaming.model import StreamedModel
from intraslice.streaming.propagate import propagate_layer

LOOKS = 4
"""How often the held-out sequences are looked at."""
LAST_RATE = 0.1
"""Share of the learning rate that is left at the end."""


def tune(context: Context, layers: FinishedLayers, kinds: Sequence[str], options: TuneOptions) -> Tuned:
    """Train the Linears of the sites of all layers, and hand in the layers if that has helped.

    The loss of a batch is the sum over its positions of KL(dense model || pruned model).

    Args:
        context: the run; the layers of its model are finished.
        layers: the pruned layers.
        kinds: of the sites that are trained.
        options: settings.

    Raises:
        OutputError: the disk has no room for weights and moments.
    """
    # The embeddings and the head of the run's own model are gone by now.
    model = StreamedModel(context.model.checkpoint, context.placement, context.model.batch_shape)
    dense = dense_outputs(model, context)
    parts = list(dense.slices())
    held = num_held_out(len(parts), options.held_out)
    train, judge = parts[:-held], parts[-held:]
    steps = max(1, round(options.epochs * len(train)))
    folder = context.folder / "tune"
    folder.mkdir(exist_ok=True)
    sites = model.sites.layers
    trained = [_Layer(layers, index, sites[index], kinds, folder, options) for index in range(model.num_layers)]
    # Of its own: a run that is interrupted and made again draws the same order.
    generator = torch.Generator().manual_seed(0)
    task = _Task(model, dense, trained, context.tokens)
    look = math.ceil(steps / LOOKS)
    runs = 2 * steps + len(judge) * (1 + LOOKS)
    with context.progress.step("tuning", total=runs * dense.batch * model.num_layers) as advance:
        before = best = task.error(judge, advance)
        kept, step = 0, 0
        while step < steps:
            for number in torch.randperm(len(train), generator=generator).tolist():
                if step == steps:
                    break
                try:
                    task.step(train[number], _rate(step, steps), advance)
                except NumericalError:
                    # All layers are finished, and what is kept is sound: no reason to lose them.
                    context.progress.note(
                        f"tuning stops after {step} of {steps} steps, because its loss is not finite; the weights of "
                        f"step {kept} are kept. A lower tune.learning_rate may help."
                    )
                    steps = step
                    break
                step += 1
                if step % look == 0 or step == steps:
                    error = task.error(judge, advance)
                    context.progress.note(
                        f"tuning step {step} of {steps}: held-out KL {error:.4f}, {before:.4f} before"
                    )
                    if error < best:
                        best, kept = error, step
                        for layer in trained:
                            layer.keep()
    if kept:
        layers.replace_layers(layer.tensors(context.placement.save_dtype) for layer in trained)
    for layer in trained:
        layer.remove()
    folder.rmdir()
    return Tuned(before=before, after=best, step=kept, steps=steps)


def _rate(step: int, steps: int) -> float:
    """Return the part of the learning rate that a step takes: 1 - beta^(step + 1), times a cosine down to LAST_RATE.

    Adam divides by how large gradients are, and its first steps are as long as all others, although the mean of the
    first few gradients is mostly noise. With the first factor a gradient never counts for more than in a mean of many.
    """
    averaged = 1.0 - BETAS[0] ** (step + 1)
    falling = 0.5 * (1.0 + math.cos(math.pi * step / steps))
    return averaged * (LAST_RATE + (1.0 - LAST_RATE) * falling)


def dense_outputs(model: StreamedModel, context: Context) -> HiddenStates:
    """Return the outputs of the last layer of the dense model for all tokens, [N, T, D]."""
    hidden = context.embedded("hidden-dense", model=model)
    with context.progress.step("what the dense model predicts", total=model.num_layers) as advance:
        for index in range(model.num_layers):
            propagate_layer(model.load_layer(index), hidden)
            advance(1)
    return hidden


class _Layer:
    """A pruned layer whose weights change: they and the two moments of Adam are mapped from a file while it is open.

    Args:
        layers: has the layer.
        index: its number.
        sites: of the layer.
        kinds: of the sites that are trained.
        folder: for the file.
        options: settings.
    """

    def __init__(
        self,
        layers: FinishedLayers,
        index: int,
        sites: Iterable[Site],
        kinds: Sequence[str],
        folder: Path,
        options: TuneOptions,
    ) -> None:
        self.index = index
        self.shape: LayerShape = layers.layer_shape(index)
        stored = layers.load_layer(index)
        paths = dict.fromkeys(path for site in sites if site.kind in kinds for path in (*site.reads, site.writes))
        names = [f"{path}.{part}" for path in paths for part in ("weight", "bias")]
        # A site that is gone as a whole has none.
        self._shapes = {name: stored[name].shape for name in names if name in stored}
        self._fixed = {name: tensor for name, tensor in stored.items() if name not in self._shapes}
        self._dtype = torch.float32
        for name in self._shapes:
            self._dtype = torch.promote_types(self._dtype, stored[name].dtype)
        self._size = sum(shape.numel() for shape in self._shapes.values())
        self._path = folder / f"{index:05d}.bin"
        self._steps = 0
        self._rates: dict[str, float] = {}
        if not self._size:
            return
        reserve(self._path, 4 * self._size * self._dtype.itemsize)
        weights, *_ = self._open()
        for name, weight in weights.items():
            weight.copy_(stored[name])
            # A step moves every entry by about the learning rate, so that it has to be relative to their size.
            self._rates[name] = options.learning_rate * float(weight.square().mean().sqrt())
        self.keep()

    def _open(self) -> list[dict[str, Tensor]]:
        """Return the weights, the two moments, and the best weights so far, by name: views of the file."""
        if not self._size:
            return [{}, {}, {}, {}]
        # Mapped anew each time: pages of a mapping that is gone do not count as memory of the process.
        whole = torch.from_file(str(self._path), shared=True, size=4 * self._size, dtype=self._dtype)
        opened = []
        for row in whole.view(4, self._size):
            pieces = row.split([shape.numel() for shape in self._shapes.values()])
            named = zip(self._shapes.items(), pieces, strict=True)
            opened.append({name: piece.view(shape) for (name, shape), piece in named})
        return opened

    def load(self, model: StreamedModel) -> DecoderLayer:
        """Return the layer with its weights as they are now."""
        return model.load_pruned_layer(self.index, self.shape, {**self._fixed, **self._open()[0]})

    def step(self, gradients: Mapping[str, Tensor], factor: float) -> None:
        """Take one step of Adam at a part of the learning rate."""
        weights, first, second, _ = self._open()
        groups = [{"params": [weights[name]], "lr": self._rates[name] * factor} for name in gradients]
        if not groups:
            return
        adam = torch.optim.Adam(groups, betas=BETAS)
        for name, gradient in gradients.items():
            weights[name].grad = gradient.to(weights[name])
            adam.state[weights[name]] = {
                "step": torch.tensor(float(self._steps)),
                "exp_avg": first[name],
                "exp_avg_sq": second[name],
            }
        adam.step()
        self._steps += 1

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the weights that are trained."""
        return tuple(self._shapes)

    def keep(self) -> None:
        """Remember the weights as the best ones so far."""
        weights, _, _, best = self._open()
        for name, weight in weights.items():
            best[name].copy_(weight)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return all tensors of the layer with the best weights, as they are stored."""
        return {**self._fixed, **{name: tensor.to(dtype) for name, tensor in self._open()[3].items()}}

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)


class _Task:
    """What the pruned model predicts on the calibration sequences, and how far that is from the dense model."""

    def __init__(self, model: StreamedModel, dense: HiddenStates, layers: Sequence[_Layer], tokens_NT: Tensor) -> None:
        self._model, self._dense, self._layers, self._tokens = model, dense, layers, tokens_NT

    def _wanted(self, part: slice) -> Tensor:
        """Return what the head of the dense model reads, [B, T, D]."""
        return self._model.after_layers(self._tokens[part], self._dense.read(part))

    @torch.no_grad()
    def error(self, parts: Sequence[slice], advance: Callable[[int], None]) -> float:
        """Return the mean divergence of a position on some sequences."""
        states = [self._model.embed(self._tokens[part]) for part in parts]
        for layer in self._layers:
            loaded = layer.load(self._model)
            states = [loaded.output(state) for state in states]
            advance(sum(map(len, states)))
        total = positions = 0
        head = LanguageHead(self._model.model)
        for part, state in zip(parts, states, strict=True):
            ours = self._model.after_layers(self._tokens[part], state).flatten(0, 1)
            total += divergence_sum(head, ours, head, self._wanted(part).flatten(0, 1))
            positions += len(ours)
        return total / positions

    def step(self, part: slice, factor: float, advance: Callable[[int], None]) -> None:
        """Take one step on the sequences of a batch.

        Raises:
            NumericalError: the loss is NaN or infinite; nothing has changed then.
        """

        def back(index: int, layer: DecoderLayer, hidden: Tensor, gradient: Tensor) -> Tensor:
            at_input, at_weights = _backward(layer, self._layers[index].trained, hidden, gradient)
            self._layers[index].step(at_weights, factor)
            return at_input

        backward_pass(
            self._model,
            self._tokens[part],
            back,
            boundary_bytes=0,  # one batch
            advance=advance,
            load=lambda index: self._layers[index].load(self._model),
            gradient=lambda tokens, top: self._model.divergence_gradient(tokens, top, self._wanted(part)),
        )


def _backward(
    layer: DecoderLayer, names: Sequence[str], hidden_BTD: Tensor, gradient_BTD: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the gradients of the loss at the layer's input, and at some of its weights."""
    parameters = {name: layer.module.get_parameter(name).requires_grad_(True) for name in names}
    with torch.enable_grad():
        hidden = hidden_BTD.detach().requires_grad_(True)
        output = layer.output(hidden)
        at_input, *at_weights = torch.autograd.grad(output, (hidden, *parameters.values()), gradient_BTD)
    return at_input, dict(zip(parameters, at_weights, strict=True))
