"""FFN compression: channel selection with ridge reconstruction; Paper: section 3.2, Eq. 8.

Shapes: N tokens, D hidden_size, F intermediate_size, P kept channels.
"""

from __future__ import annotations

from torch import Tensor

from intraslice.edits import FFNEdit
from intraslice.linalg import residual_energy, ridge_solve
from intraslice.options import FFNOptions
from intraslice.selection import top_indices


def channel_scores(act_FF: Tensor, down_weight: Tensor) -> Tensor:
    """Return ||act_:,i||^2 ||W_down_:,i||^2, [F]."""
    return act_FF.diagonal() * down_weight.double().square().sum(0)


def solve_down(act_FF: Tensor, down_weight: Tensor, channels: Tensor, options: FFNOptions) -> tuple[FFNEdit, float]:
    """Return the edit that keeps `channels`, and the block's relative error; Paper: Eq. 8.

    With A the kept channels and Y the block's output, W_down' is the ridge regression of Y on A. Both products are
    sub-matrices of the second moment of `act`, multiplied by W_down.

    Args:
        act_FF: second moment of `act`, float64.
        down_weight: [D, F].
        channels: int64 [P], ascending.
        options: settings.
    """
    down = down_weight.double()
    gram = act_FF[channels][:, channels]
    cross = act_FF[channels] @ down.T  # [P, D]
    removed = down[:, channels].T  # what removal without repair leaves
    if options.reconstruct and len(channels) < down.shape[1]:
        prior = removed if options.shrink_to == "weights" else None
        solution = ridge_solve(gram, cross, options.damping, prior)
    else:
        solution = removed
    target_energy = float((down.T * (act_FF @ down.T)).sum())
    error = residual_energy(target_energy, gram, cross, solution)
    edit = FFNEdit(channels=channels, up_map=None, gate_map=None, down_weight=solution.T.contiguous())
    return edit, max(error, 0.0) / max(target_energy, 1e-30)


def select_channels(act_FF: Tensor, down_weight: Tensor, keep: int) -> Tensor:
    """Return the kept channels, int64 [keep], ascending: those with the largest scores."""
    return top_indices(channel_scores(act_FF, down_weight), keep)
