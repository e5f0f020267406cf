"""Progressive sliced iterative PCA; Paper: section 3.2.1, Eq. 7, Algorithm 3.

The channel selection of up and gate is relaxed to dense maps Q_c, which still fuse because they act before the
nonlinearity. One slice of the input channels of Q_c is optimised at a time; what the other slices contribute is
the constant C. Then Q_r is solved again (Eq. 8), and both alternate.

Two choices where the paper leaves room. C holds the other slices at their current values, those after the current
one included: with the selection as the start, leaving them out would ask the first slice to imitate channels it
does not contain. And the best solution seen wins, the initial one included, so the step never makes a block worse
on the calibration tokens.

Shapes: N tokens, F intermediate_size, P kept channels, D hidden_size, s channels of a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from intraslice.algebra.linalg import residual_energy, ridge_solve
from intraslice.algebra.statistics import SecondMoment
from intraslice.layers.weights import FFNEdit
from intraslice.methods.blockwise.options import FFNOptions
from intraslice.methods.blockwise.repairs import OutputMoments
from intraslice.placement import with_float64

_DEFAULT_SLICES = 4
_PINV_DAMPING = 1e-3


class Preactivations(Protocol):
    """Replays the outputs of up and gate ([N, F] each; gate may be None) and the target Y [N, D], batch by batch."""

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The nonlinearity."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]: ...


class _AtLeastFloat32:
    """Batches of half precision as float32: the squared sums of Eq. 7 and the epsilon of Adam do not fit float16."""

    def __init__(self, preactivations: Preactivations) -> None:
        self.activation = preactivations.activation
        self._preactivations = preactivations

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        for up, gate, target in self._preactivations:
            dtype = torch.promote_types(up.dtype, torch.float32)
            yield up.to(dtype), None if gate is None else gate.to(dtype), target.to(dtype)


def pseudo_inverse(recon_PF: Tensor) -> Tensor:
    """Return Q_r^+ [F, P] by damped normal equations: Q_r^T (Q_r Q_r^T + e I)^-1."""
    return ridge_solve(recon_PF @ recon_PF.T, recon_PF, _PINV_DAMPING).T.contiguous()


def iterate_pca(
    preactivations: Preactivations,
    moments: OutputMoments,
    initial: FFNEdit,
    initial_error: float,
    options: FFNOptions,
) -> tuple[FFNEdit, float]:
    """Improve a channel selection by dense maps of the pre-activations.

    Args:
        preactivations: outputs of up and gate on the calibration tokens.
        moments: sums over the block; Z is `act`.
        initial: the channel selection to start from.
        initial_error: its relative error.
        options: settings.

    Returns:
        The better of the initial and the iterated edit, and its relative error.
    """
    channels = initial.channels
    if channels is None:
        raise ValueError("iterate_pca starts from a channel selection")
    preactivations = _AtLeastFloat32(preactivations)
    act_FF, width = moments.gram, moments.gram.shape[0]
    selection = torch.zeros(width, len(channels))
    selection[channels, torch.arange(len(channels))] = 1.0
    per_channel = options.damping_scale == "channel"
    # Q_r, [P, F]
    recon = ridge_solve(act_FF[channels][:, channels], act_FF[channels], options.damping, per_channel=per_channel)
    up, gate, _ = next(iter(preactivations))
    start = selection.to(up)
    maps = (start, None if gate is None else start)
    best, best_error = initial, initial_error
    for round_index in range(options.iter_pca_rounds):
        inverse = pseudo_inverse(recon)
        maps = _optimise_slices(preactivations, maps, inverse.to(maps[0]), round_index, options)
        gram, cross_act, cross = _moments(preactivations, maps)
        prior = best.down_weight.T if options.shrink_to == "weights" else None
        solution = ridge_solve(gram, cross, options.damping, prior, per_channel=per_channel)
        error = residual_energy(moments.target_energy, gram, cross, solution) / max(moments.target_energy, 1e-30)
        if error >= best_error:
            break
        up_map, gate_map = maps
        best = FFNEdit(
            channels=None,
            up_map=up_map.to("cpu").to(torch.float64),
            gate_map=None if gate_map is None else gate_map.to("cpu").to(torch.float64),
            down_weight=solution.T.contiguous(),
        )
        best_error = error
        recon = ridge_solve(gram, cross_act, options.damping, per_channel=per_channel)
    return best, best_error


def _compressed(activation: Callable[[Tensor], Tensor], up_NP: Tensor, gate_NP: Tensor | None) -> Tensor:
    return activation(up_NP) if gate_NP is None else activation(gate_NP) * up_NP


def _moments(preactivations: Preactivations, maps: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Return A^T A [P, P], A^T act [P, F] and A^T Y [P, D] with A the compressed `act`, float64."""
    up_map, gate_map = maps
    width, kept = up_map.shape
    gram = SecondMoment(kept, None, with_float64(up_map.device), torch.float64)
    cross_act = SecondMoment(kept, width, with_float64(up_map.device), torch.float64)
    cross = None
    for up, gate, target in preactivations:
        if cross is None:
            cross = SecondMoment(kept, target.shape[1], with_float64(up_map.device), torch.float64)
        compressed = _compressed(
            preactivations.activation, up @ up_map, None if gate is None or gate_map is None else gate @ gate_map
        )
        gram.update(compressed)
        cross_act.update(compressed, _compressed(preactivations.activation, up, gate))
        cross.update(compressed, target)
    assert cross is not None
    return gram.value, cross_act.value, cross.value


def _optimise_slices(
    preactivations: Preactivations,
    maps: tuple[Tensor, Tensor | None],
    inverse_FP: Tensor,
    round_index: int,
    options: FFNOptions,
) -> tuple[Tensor, Tensor | None]:
    """Return maps after a few Adam steps on each slice in turn; Paper: Eq. 7.

    A step sees iter_pca_batches batches of tokens; the steps of all slices walk through the calibration tokens in
    order. The learning rate falls slice by slice, and halves each round.
    """
    up_map, gate_map = maps[0].clone(), None if maps[1] is None else maps[1].clone()
    width = up_map.shape[0]
    size = options.iter_pca_slice or -(-width // _DEFAULT_SLICES)
    slices = [slice(start, min(start + size, width)) for start in range(0, width, size)]
    batches = _endless(preactivations)
    for number, part in enumerate(slices):
        share = 0.5**number if options.iter_pca_decay == "halving" else 1.0 - number / len(slices)
        rate = options.iter_pca_lr * share * 0.5**round_index
        up_part = up_map[part].clone().requires_grad_(True)
        gate_part = None if gate_map is None else gate_map[part].clone().requires_grad_(True)
        parameters = [up_part] if gate_part is None else [up_part, gate_part]
        adam = torch.optim.Adam(parameters, lr=rate)
        for step in range(options.iter_pca_steps * options.iter_pca_batches):
            up, gate, _ = next(batches)
            with torch.no_grad():
                target = _compressed(preactivations.activation, up, gate) @ inverse_FP  # Y^r, [N, P]
                # C of Eq. 7: everything but this slice.
                up_rest = up @ up_map - up[:, part] @ up_map[part]
                gate_rest = None
                if gate is not None and gate_map is not None:
                    gate_rest = gate @ gate_map - gate[:, part] @ gate_map[part]
            with torch.enable_grad():
                up_out = up[:, part] @ up_part + up_rest
                gate_out = None
                if gate is not None and gate_part is not None and gate_rest is not None:
                    gate_out = gate[:, part] @ gate_part + gate_rest
                output = _compressed(preactivations.activation, up_out, gate_out)
                loss = (output - target).square().sum() / target.square().sum().clamp_min(1e-30)
                (loss / options.iter_pca_batches).backward()
            if (step + 1) % options.iter_pca_batches == 0:
                adam.step()
                adam.zero_grad()
        up_map[part] = up_part.detach()
        if gate_map is not None and gate_part is not None:
            gate_map[part] = gate_part.detach()
    return up_map, gate_map


def _endless(preactivations: Preactivations) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    while True:
        yield from preactivations
