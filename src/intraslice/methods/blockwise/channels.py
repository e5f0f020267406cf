"""FFN compression: channel selection, and the repair of down_proj; Paper: section 3.2, Eq. 8.

Shapes: N tokens, D hidden_size, F intermediate_size, P kept channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from intraslice.algebra.selection import top_indices
from intraslice.layers.weights import FFNEdit
from intraslice.methods.blockwise.options import FFNOptions
from intraslice.methods.blockwise.repairs import Output, OutputMoments, repair_output
from intraslice.methods.blockwise.scores import ScoreInput
from intraslice.methods.blockwise.strategies import SCORES
from intraslice.methods.choices import load


def own_output(moments: OutputMoments, down_weight: Tensor) -> OutputMoments:
    """Return the moments for Y = act W_down^T, the site's own output: they follow from those of `act`."""
    down = down_weight.double()
    cross = moments.gram @ down.T
    return replace(
        moments,
        cross=cross,
        target_sum=moments.input_sum @ down.T,
        target_energy=float((down.T * cross).sum()),
        own_cross=None,
        halves=tuple(own_output(half, down_weight) for half in moments.halves),
    )


def with_own_output(moments: OutputMoments, down_weight: Tensor) -> OutputMoments:
    """Return the moments with those of the site's own output, act W_down^T, beside those of the target."""
    return replace(
        moments,
        own_cross=moments.gram @ down_weight.double().T,
        halves=tuple(with_own_output(half, down_weight) for half in moments.halves),
    )


def solve_down(
    moments: OutputMoments, down_weight: Tensor, channels: Tensor, options: FFNOptions
) -> tuple[FFNEdit, float]:
    """Return the edit that keeps `channels`, and the block's relative error; Paper: Eq. 8.

    With A the kept channels, W_down' is the ridge regression of Y on A, or what another repair makes of W_down.

    Args:
        moments: sums over the block; Z is `act`.
        down_weight: [D, F].
        channels: int64 [P], ascending.
        options: settings.
    """
    kept = moments.of_channels(channels)
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


def channel_scores(
    moments: OutputMoments,
    down_weight: Tensor,
    keep: int,
    options: FFNOptions,
    reading: Sequence[Tensor] = (),
    measured: Tensor | None = None,
) -> Tensor:
    """Return what each channel is worth by the score that `options.score` names, [F].

    Args:
        moments: sums over the site; Z is `act`.
        down_weight: [D, F].
        keep: channels that will stay.
        options: settings.
        reading: weights of up and gate, [F, D] each.
        measured: scores that were measured before the first layer changed, [F].
    """
    width = moments.gram.shape[0]
    site = ScoreInput(
        energy=moments.gram.diagonal(),
        total=moments.input_sum,
        moment=moments.gram,
        num_tokens=moments.num_tokens,
        weight=down_weight,
        units=width,
        removed=width - keep,
        damping=options.obs_damping,
        read_energy=moments.read_energy,
        reading=tuple(reading),
        measured=measured,
    )
    return load(SCORES[options.score].channels)(site)


def select_channels(
    moments: OutputMoments,
    down_weight: Tensor,
    keep: int,
    options: FFNOptions,
    reading: Sequence[Tensor] = (),
    measured: Tensor | None = None,
) -> Tensor:
    """Return the kept channels, int64 [keep], ascending: those with the largest scores."""
    return top_indices(channel_scores(moments, down_weight, keep, options, reading, measured), keep)
