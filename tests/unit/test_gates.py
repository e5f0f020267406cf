"""Gates: how they are sampled, what their number costs, what they do to a projection, and what sites keep by them."""

from __future__ import annotations

import math

import pytest
import torch

from intraslice.methods.blockwise.allocators.gates import allocate_by_gates
from intraslice.methods.blockwise.gates import OFFSET, TEMPERATURE, Gate, GateNetwork, sampled_gates, size_penalty
from intraslice.methods.blockwise.options import AllocationOptions
from support.model_sites import kept_share, sites


def test_gates_are_rounded_and_have_the_gradient_of_the_sigmoid():
    logits = torch.linspace(-8.0, 4.0, 50).requires_grad_(True)
    (gates,) = sampled_gates([logits], torch.Generator().manual_seed(0))
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    gates.sum().backward()
    noise = -torch.log(-torch.log(torch.rand(50, generator=torch.Generator().manual_seed(0))))
    soft = torch.sigmoid((logits.detach() + OFFSET + noise) / TEMPERATURE)
    assert torch.equal(gates.detach(), soft.round())
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / TEMPERATURE)


def test_the_penalty_is_the_logarithm_of_the_ratio_of_the_sizes():
    gates = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])]
    share = (100 * 0.5 + 300 * 0.75) / 400
    for kept in (0.5, 0.9):
        ratio = max(share, kept) / min(share, kept)
        assert float(size_penalty(gates, (100, 300), kept)) == pytest.approx(math.log(ratio))
    assert float(size_penalty(gates, (100, 300), share)) == pytest.approx(0.0, abs=1e-6)
    assert math.isfinite(float(size_penalty([torch.zeros(3)], (1,), 0.5)))


def test_a_shut_gate_takes_a_direction_out_of_what_a_projection_reads():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 3, 8, generator=generator)
    bases = torch.linalg.qr(torch.randn(2, 4, 4, generator=generator))[0]
    projection = torch.nn.Linear(8, 5)
    for gate, directions in ((Gate(bases), torch.block_diag(*bases)), (Gate(), torch.eye(8))):
        hook = projection.register_forward_pre_hook(gate)
        gate.values = torch.ones(8)
        whole = projection(inputs)
        gate.values = torch.ones(8).index_fill(0, torch.tensor([5]), 0.0)
        found = projection(inputs)
        hook.remove()
        torch.testing.assert_close(whole, projection(inputs))
        gone = directions[:, 5]
        torch.testing.assert_close(found, projection(inputs - (inputs @ gone)[..., None] * gone))


def test_the_network_gives_every_site_its_logits():
    assert [logits.shape for logits in GateNetwork([3, 7])()] == [(3,), (7,)]


def test_sites_keep_what_is_above_one_threshold():
    of = sites([80, 80], [240, 240], heads=4, channels=20)
    measured = [
        {"attention": torch.tensor([3.0, 2.0, 1.0, 0.0]), "ffn": torch.arange(20.0) - 30.0},
        {"attention": torch.tensor([3.0, 2.0, 1.0, -40.0]), "ffn": torch.arange(20.0)},
    ]
    found = allocate_by_gates(measured, of, 0.3, AllocationOptions())
    assert kept_share(of, found.keep) == pytest.approx(0.7)
    # Of 192 weights that go, the head at -40 has 20, and 15 channels of 12 have the next logits; what is 8 too many is
    # spread over the sites that lose.
    assert found.keep[1]["attention"] == pytest.approx(0.75 + 8 / 320)
    assert found.keep[0]["ffn"] == pytest.approx(5 / 20 + 8 / 320)
    assert found.keep[0]["attention"] == pytest.approx(1.0) and found.keep[1]["ffn"] == pytest.approx(1.0)
