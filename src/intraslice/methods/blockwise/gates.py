"""Gates whose logits a small network gives, and what their number costs. Paper: DISP-LLM.

Shapes: C gates of a site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_PLACE = 32
"""Width of what stands for a site at the input of the network; the published sizes."""

OFFSET, TEMPERATURE = 3.0, 0.4
"""Of the gates: an offset of 3 leaves nearly all of them open at first."""


class GateNetwork(nn.Module):
    """One logit for each gate: a recurrent network that goes over the sites in both directions, and a Linear for each.

    Its input is a fixed random vector for each site, so that what it gives depends on its weights alone.

    Args:
        sizes: number of gates of each site, in the order in which they run.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("places", torch.randn(len(sizes), 1, _PLACE))
        self.recurrent = nn.GRU(_PLACE, 2 * _PLACE, bidirectional=True)
        self.norm = nn.LayerNorm(4 * _PLACE)
        self.out = nn.ModuleList(nn.Linear(4 * _PLACE, size, bias=False) for size in sizes)

    def forward(self) -> list[Tensor]:
        """Return the logits of each site, [C]."""
        states, _ = self.recurrent(self.places)
        rows = nn.functional.gelu(self.norm(states[:, 0]))
        return [out(row) for out, row in zip(self.out, rows, strict=True)]


def sampled_gates(logits: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Return gates of 0 or 1, [C] each: the rounded sigmoid((logit + offset + g) / temperature) with Gumbel noise g.

    The gradient is that of the sigmoid (straight-through).
    """
    gates = []
    for of_site in logits:
        noise = -torch.log(-torch.log(torch.rand(of_site.shape, generator=generator).clamp(1e-20, 1.0 - 1e-7)))
        soft = torch.sigmoid((of_site + OFFSET + noise) / TEMPERATURE)
        gates.append((soft.round() - soft).detach() + soft)
    return gates


def size_penalty(gates: Sequence[Tensor], weights: Sequence[int], kept: float) -> Tensor:
    """Return log(max(T, p) / min(T, p)), with T the share of the weights whose gates are open.

    Args:
        gates: of each site, [C].
        weights: of each site.
        kept: p, the share that shall be open.
    """
    share = torch.stack([gate.mean() * count for gate, count in zip(gates, weights, strict=True)]).sum() / sum(weights)
    # Where all gates are shut there is no logarithm, and their gradient opens them all the same.
    return (share.clamp_min(1e-6).log() - math.log(kept)).abs()


class Gate:
    """Multiplies directions of what an output projection reads by gates: a forward pre-hook of the projection.

    Args:
        bases: directions of each block of channels as columns, [C / w, w, w]; None gates the channels themselves.
    """

    def __init__(self, bases: Tensor | None = None) -> None:
        self.bases = bases
        self.values: Tensor | None = None

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the arguments of the projection with gates on what it reads, [B, T, C]."""
        (inputs, *others), values = given, self.values
        if values is None:
            return given
        if self.bases is None:
            return (inputs * values, *others)
        blocks, width, _ = self.bases.shape
        directions = torch.einsum("btnw,nwv->btnv", inputs.unflatten(2, (blocks, width)), self.bases)
        gated = torch.einsum("btnv,nwv->btnw", directions * values.view(blocks, width), self.bases)
        return (gated.flatten(2), *others)
