"""Eq. 7 on half-precision activations, as an accelerator has them."""

from __future__ import annotations

import pytest
import torch

from intraslice.methods.blockwise.channels import select_channels, solve_down
from intraslice.methods.blockwise.iter_pca import iterate_pca
from intraslice.methods.blockwise.options import FFNOptions
from support.output_moments import moments_of


class Replay:
    activation = torch.nn.SiLU()

    def __init__(self, dtype: torch.dtype, down: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        self.up, self.gate = (torch.randn(1024, 128, generator=generator).to(dtype) for _ in range(2))
        self.down = down.to(dtype)

    @property
    def act(self) -> torch.Tensor:
        return self.activation(self.gate) * self.up

    def __iter__(self):
        yield self.up, self.gate, self.act @ self.down.T


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_improves_a_block_as_float32_does(dtype: torch.dtype):
    down = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    options = FFNOptions(iter_pca=True, shrink_to="zero", damping=0.01, repair_against="own_output")
    errors = {}
    for kind in (torch.float32, dtype):
        replay = Replay(kind, down)
        act = replay.act.double()
        moments = moments_of(act, act @ down.double().T)
        edit, error = solve_down(moments, down, select_channels(moments, down, 64, options), options)
        errors[kind] = (error, iterate_pca(replay, moments, edit, error, options)[1])
    before, after = errors[dtype]
    assert after < before
    assert after == pytest.approx(errors[torch.float32][1], rel=0.02)  # the activations themselves are rounded
