"""Moments of an output projection from explicit inputs and targets."""

from __future__ import annotations

import torch

from intraslice.methods.blockwise.repairs import OutputMoments


def moments_of(inputs: torch.Tensor, targets: torch.Tensor) -> OutputMoments:
    """Return the moments of inputs [N, P] that should make targets [N, D]."""
    return OutputMoments(
        gram=inputs.T @ inputs,
        cross=inputs.T @ targets,
        input_sum=inputs.sum(0),
        target_sum=targets.sum(0),
        target_energy=float(targets.square().sum()),
        num_tokens=len(inputs),
    )
