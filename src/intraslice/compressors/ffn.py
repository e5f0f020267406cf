"""FFN compression: channel selection with ridge reconstruction; Paper: section 3.2, Eq. 8.

Shapes: N tokens, D hidden_size, F intermediate_size, P kept channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from intraslice.edits import FFNEdit
from intraslice.linalg import residual_energy, ridge_solve
from intraslice.options import FFNOptions
from intraslice.selection import top_indices


def channel_scores(act_FF: Tensor, down_weight: Tensor) -> Tensor:
    """Return ||act_:,i||^2 ||W_down_:,i||^2, [F]."""
    return act_FF.diagonal() * down_weight.double().square().sum(0)


@dataclass(frozen=True, kw_only=True)
class FFNMoments:
    """Sums over tokens of the block, float64.

    Attributes:
        act: act^T act, [F, F].
        target: act^T Y with Y what the block should add to the residual stream, without bias, [F, D].
        target_energy: ||Y||^2.
    """

    act: Tensor
    target: Tensor
    target_energy: float


def block_target(act_FF: Tensor, down_weight: Tensor) -> FFNMoments:
    """Return the moments for Y = act W_down^T, the block's own output: they follow from the second moment of `act`."""
    down = down_weight.double()
    target = act_FF @ down.T
    return FFNMoments(act=act_FF, target=target, target_energy=float((down.T * target).sum()))


def solve_down(
    moments: FFNMoments, down_weight: Tensor, channels: Tensor, options: FFNOptions
) -> tuple[FFNEdit, float]:
    """Return the edit that keeps `channels`, and the block's relative error; Paper: Eq. 8.

    With A the kept channels, W_down' is the ridge regression of Y on A.

    Args:
        moments: sums over the dense block.
        down_weight: [D, F].
        channels: int64 [P], ascending.
        options: settings.
    """
    gram = moments.act[channels][:, channels]
    cross = moments.target[channels]
    removed = down_weight.double()[:, channels].T  # what removal without repair leaves
    if options.reconstruct and len(channels) < down_weight.shape[1]:
        prior = removed if options.shrink_to == "weights" else None
        solution = ridge_solve(gram, cross, options.damping, prior)
    else:
        solution = removed
    error = residual_energy(moments.target_energy, gram, cross, solution)
    edit = FFNEdit(channels=channels, up_map=None, gate_map=None, down_weight=solution.T.contiguous())
    return edit, max(error, 0.0) / max(moments.target_energy, 1e-30)


def select_channels(act_FF: Tensor, down_weight: Tensor, keep: int) -> Tensor:
    """Return the kept channels, int64 [keep], ascending: those with the largest scores."""
    return top_indices(channel_scores(act_FF, down_weight), keep)
