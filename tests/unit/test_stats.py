"""Sums do not depend on how the tokens are cut into batches, and equal the float64 reference."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice.algebra.statistics import BlockSecondMoment, SecondMoment, Sum

CPU = torch.device("cpu")


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=6), flush=st.sampled_from([1, 16, 16384]))
def test_second_moment_does_not_depend_on_batching(cuts, flush):
    x = torch.randn(sum(cuts), 5, generator=torch.Generator().manual_seed(0))
    y = torch.randn(sum(cuts), 3, generator=torch.Generator().manual_seed(1))
    own, cross = SecondMoment(5, None, CPU, torch.float64), SecondMoment(5, 3, CPU, torch.float64)
    own.flush_tokens = cross.flush_tokens = flush
    for part_x, part_y in zip(x.split(cuts), y.split(cuts), strict=True):
        own.update(part_x)
        cross.update(part_x, part_y)
    assert own.num_tokens == len(x)
    assert torch.allclose(own.value, x.double().T @ x.double(), rtol=1e-5, atol=1e-4)  # float32 products
    assert torch.allclose(cross.value, x.double().T @ y.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(own.value, own.value.T)


def test_second_moment_of_half_precision_activations_is_computed_in_float32():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    moment = SecondMoment(4, None, CPU, torch.float64)
    moment.update(x)
    assert torch.allclose(moment.value, x.double().T @ x.double(), rtol=1e-5, atol=1e-4)


def test_block_second_moment_is_the_diagonal_blocks():
    x = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = BlockSecondMoment(3, 2, CPU, torch.float64)
    for part in x.split(7):
        moment.update(part)
    full = x.T @ x
    for block in range(3):
        part = slice(2 * block, 2 * block + 2)
        assert torch.allclose(moment.value[block], full[part, part], atol=1e-12)


def test_a_sum_keeps_what_float32_would_lose():
    total = Sum(2, 3, device=CPU, dtype=torch.float64)
    total.update(torch.full((2, 3), 2.0**24))
    for _ in range(3):
        total.update(torch.ones(2, 3))  # float32 has no 2**24 + 1
    assert torch.equal(total.value, torch.full((2, 3), 2.0**24 + 3, dtype=torch.float64))
