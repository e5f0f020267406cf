"""Trains all weights of a pruned site towards its target, from where the closed form leaves them: local distillation.

The closed form solves the output projection alone. What reads the site's input can help as well, and there is no closed
form for it. So a few steps of Adam follow, one site at a time, with the target of the repair. Some sequences are held
out: they decide how long it goes on, and whether anything changes at all.

Shapes: B sequences of a batch, T tokens, D hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intraslice.errors import NumericalError, RecipeError
from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.sites import ATTENTION, Site
from intraslice.methods.blockwise.measure import OutputAim, aimed_between
from intraslice.methods.blockwise.options import AttentionOptions, DistillOptions, FFNOptions
from intraslice.placement import for_float64
from intraslice.streaming.hidden import Streams
from intraslice.streaming.model import StreamedModel

_LOOKS = 4
"""How often the held-out sequences are looked at."""
BETAS = (0.9, 0.95)
"""Of Adam: as few steps need a second moment that forgets sooner than usual."""


@dataclass(frozen=True)
class Distilled:
    """What training has changed.

    Attributes:
        before: relative squared error on the held-out sequences after the closed form.
        after: the same at the end; no larger.
    """

    before: float
    after: float


def num_held_out(num_batches: int, share: float) -> int:
    """Return how many of the batches are held out of a training.

    Args:
        num_batches: of calibration text.
        share: of them that is wanted.

    Raises:
        RecipeError: nothing would be left to train on, or to judge by.
    """
    if num_batches < 2:
        raise RecipeError(
            "distill.sites needs two batches of calibration text, one to train on and one to judge by, and there is "
            f"{num_batches}; give more --num-samples, lower run.batch_tokens, or set distill.sites=none."
        )
    return min(max(1, round(share * num_batches)), num_batches - 1)


def distill_site(
    model: StreamedModel,
    layer: DecoderLayer,
    index: int,
    site: Site,
    streams: Streams,
    of_site: AttentionOptions | FFNOptions,
    options: DistillOptions,
) -> Distilled:
    """Train the Linears of a pruned site in place.

    The loss of a token is ||o - y||^2 / ||x + y||^2 with x the residual stream, o what the site adds and y what it
    should add: the norm that reads the sum sees errors relative to it.

    Args:
        model: the streamed model.
        layer: the site is pruned and repaired.
        index: number of the layer.
        site: to train.
        streams: the pruned stream at the input of the site, the dense stream behind it.
        of_site: options of the site; they say what it should give.
        options: settings.

    Raises:
        NumericalError: the loss is NaN or infinite.
    """
    teacher = model.load_layer(index)
    task = _Task(layer, teacher, site, streams, of_site)
    parts = list(streams.pruned.slices())
    held = num_held_out(len(parts), options.held_out)
    train, judge = parts[:-held], parts[-held:]
    # Of its own: a resumed run draws the same order.
    generator = torch.Generator().manual_seed(index)
    trained = _Trained([layer.module.get_submodule(path) for path in (*site.reads, site.writes)], options)
    steps = max(1, round(options.epochs * len(train)))
    before = best = task.error(judge)
    step = 0
    look = math.ceil(steps / _LOOKS)
    while step < steps:
        for number in torch.randperm(len(train), generator=generator).tolist():
            if step == steps:
                break
            with torch.enable_grad():
                loss = task.loss(train[number])
                loss.backward()
            trained.step(0.5 * (1.0 + math.cos(math.pi * step / steps)))
            step += 1
            if step % look == 0 or step == steps:
                error = task.error(judge)
                if error < best:
                    best = error
                    trained.keep()
    trained.finish()
    return Distilled(before, best)


class _Task:
    """What a site should give on the calibration sequences, and how far it is from that."""

    def __init__(
        self,
        layer: DecoderLayer,
        teacher: DecoderLayer,
        site: Site,
        streams: Streams,
        of_site: AttentionOptions | FFNOptions,
    ) -> None:
        self._layer, self._teacher, self._streams = layer, teacher, streams
        self._is_attention = site.kind == ATTENTION
        to_stream = of_site.repair_against == "dense_stream" and of_site.measured_on == "pruned_stream"
        self._against_stream = to_stream and streams.dense is not None
        self._share = OutputAim(teacher, site.kind).drift_share(of_site.drift_share)

    def _sum_before(self, states_BTD: Tensor) -> Tensor:
        """Return the residual stream that the site adds to."""
        return states_BTD if self._is_attention else self._layer.ffn_residual(states_BTD)

    def _added(self, layer: DecoderLayer, states_BTD: Tensor) -> Tensor:
        if self._is_attention:
            return layer.attention_output(layer.attention, states_BTD)
        return layer.ffn_output(states_BTD)

    @torch.no_grad()
    def _aim(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return the input of the site, what it should add, and the energy of the sum of both, [B, T]."""
        states = self._streams.pruned.read(part)
        residual = self._sum_before(states)
        if not self._against_stream:
            target = self._added(self._teacher, states)
        else:
            assert self._streams.dense is not None
            dense = self._streams.dense.read(part)
            if self._is_attention and self._layer.parallel:
                # The dense stream waits for the FFN, which reads the same input, at the input of the layer.
                dense = self._teacher.add_attention(dense, self._added(self._teacher, dense))
            target = dense - residual
            if self._share is not None:
                target = aimed_between(self._added(self._teacher, states), target, self._share)
        energy = (residual + target).float().square().sum(-1)
        return states, target, energy.clamp_min(torch.finfo(torch.float32).tiny)

    def _terms(self, part: slice) -> Tensor:
        states, target, energy = self._aim(part)
        missing = (self._added(self._layer, states) - target).float()
        return missing.square().sum(-1) / energy

    def loss(self, part: slice) -> Tensor:
        """Return the mean over the tokens of some sequences.

        Raises:
            NumericalError: it is NaN or infinite.
        """
        loss = self._terms(part).mean()
        if not torch.isfinite(loss):
            raise NumericalError(
                "distillation diverges; lower distill.learning_rate, or leave it out with distill.sites=none."
            )
        return loss

    @torch.no_grad()
    def error(self, parts: Sequence[slice]) -> float:
        """Return the mean over the tokens of all these sequences."""
        terms = [self._terms(part) for part in parts]
        return float(for_float64(torch.cat([term.flatten() for term in terms])).double().mean())


class _Trained:
    """Weights in training: float32 copies that Adam moves, whatever the dtype that the layer computes in.

    Args:
        linears: whose weights and biases are trained.
        options: settings.
    """

    def __init__(self, linears: Sequence[nn.Module], options: DistillOptions) -> None:
        self._parameters = [parameter for linear in dict.fromkeys(linears) for parameter in linear.parameters()]
        self._masters = [
            parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for parameter in self._parameters
        ]
        self._best: list[Tensor] = [parameter.detach().clone() for parameter in self._parameters]
        # A step moves every entry by about the learning rate, so that it has to be relative to their size.
        groups = [
            {"params": [master], "lr": options.learning_rate * float(master.square().mean().sqrt())}
            for master in self._masters
        ]
        self._rates = [group["lr"] for group in groups]
        self._adam = torch.optim.Adam(groups, betas=BETAS)
        for parameter in self._parameters:
            parameter.requires_grad_(True)

    def step(self, factor: float) -> None:
        """Take one step of Adam with the gradients that are there, at a part of the learning rate."""
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.to(master.dtype)
            parameter.grad = None
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._adam.step()
        self._copy(self._masters)

    def keep(self) -> None:
        """Remember the weights as the best ones so far."""
        self._best = [parameter.detach().clone() for parameter in self._parameters]

    def finish(self) -> None:
        """Go back to the best weights, and stop training."""
        for parameter in self._parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._copy(self._best)

    @torch.no_grad()
    def _copy(self, tensors: Sequence[Tensor]) -> None:
        for parameter, tensor in zip(self._parameters, tensors, strict=True):
            parameter.copy_(tensor)
