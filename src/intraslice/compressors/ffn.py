"""FFN compression: channel selection, and the repair of down_proj; Paper: section 3.2, Eq. 8.

Shapes: N tokens, D hidden_size, F intermediate_size, P kept channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from intraslice.compressors.repairs import Output, OutputMoments, repair_output
from intraslice.compressors.scores import (
    elimination_ranks,
    energy_scores,
    feature_scores,
    fluctuation_scores,
    magnitude_scores,
    norm_scores,
)
from intraslice.edits import FFNEdit
from intraslice.options import FFNOptions
from intraslice.selection import top_indices


@dataclass(frozen=True, kw_only=True)
class FFNMoments:
    """Sums over tokens of the block, float64.

    Attributes:
        act: act^T act, [F, F].
        act_sum: sum of act, [F].
        target: act^T Y with Y what the block should add to the residual stream, without bias, [F, D].
        target_sum: sum of Y, [D].
        target_energy: ||Y||^2.
        num_tokens: N.
    """

    act: Tensor
    act_sum: Tensor
    target: Tensor
    target_sum: Tensor
    target_energy: float
    num_tokens: int


def block_target(act_FF: Tensor, act_sum_F: Tensor, num_tokens: int, down_weight: Tensor) -> FFNMoments:
    """Return the moments for Y = act W_down^T, the block's own output: they follow from the moments of `act`."""
    down = down_weight.double()
    target = act_FF @ down.T
    return FFNMoments(
        act=act_FF,
        act_sum=act_sum_F,
        target=target,
        target_sum=act_sum_F @ down.T,
        target_energy=float((down.T * target).sum()),
        num_tokens=num_tokens,
    )


def solve_down(
    moments: FFNMoments, down_weight: Tensor, channels: Tensor, options: FFNOptions
) -> tuple[FFNEdit, float]:
    """Return the edit that keeps `channels`, and the block's relative error; Paper: Eq. 8.

    With A the kept channels, W_down' is the ridge regression of Y on A, or what another repair makes of W_down.

    Args:
        moments: sums over the dense block.
        down_weight: [D, F].
        channels: int64 [P], ascending.
        options: settings.
    """
    kept = OutputMoments(
        gram=moments.act[channels][:, channels],
        cross=moments.target[channels],
        input_sum=moments.act_sum[channels],
        target_sum=moments.target_sum,
        target_energy=moments.target_energy,
        num_tokens=moments.num_tokens,
    )
    removed = down_weight.double()[:, channels].T  # what removal without repair leaves
    output = repair_output(kept, removed, options) if len(channels) < down_weight.shape[1] else Output(removed)
    edit = FFNEdit(
        channels=channels,
        up_map=None,
        gate_map=None,
        down_weight=output.weight.T.contiguous(),
        down_bias=output.bias,
    )
    return edit, output.relative_error(kept)


def channel_scores(moments: FFNMoments, down_weight: Tensor, keep: int, options: FFNOptions) -> Tensor:
    """Return what each channel is worth by the rule that `options.score` names, [F].

    Args:
        moments: sums over the dense block.
        down_weight: [D, F].
        keep: channels that will stay.
        options: settings.
    """
    energy = moments.act.diagonal()
    if options.score == "norm":
        return norm_scores(energy, down_weight)
    if options.score == "magnitude":
        return magnitude_scores(energy)
    if options.score == "fluctuation":
        return fluctuation_scores(energy, moments.act_sum, moments.num_tokens, down_weight)
    if options.score == "feature":
        return feature_scores(moments.act, moments.act_sum, moments.num_tokens, down_weight)
    if options.score == "obs":
        width = len(energy)
        return elimination_ranks(moments.act, down_weight, width, width - keep, options.damping)
    return energy_scores(energy, down_weight)


def select_channels(moments: FFNMoments, down_weight: Tensor, keep: int, options: FFNOptions) -> Tensor:
    """Return the kept channels, int64 [keep], ascending: those with the largest scores."""
    return top_indices(channel_scores(moments, down_weight, keep, options), keep)
