"""Sums do not depend on how the tokens are cut: into batches, into merged parts, or over processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from intraslice.algebra.statistics import BlockSecondMoment, SecondMoment, Statistics, Sum
from support.sums import CPU, C, N, inputs_of, measured, reduce_in_process

NAMES = {"moment", "cross", "blocks", "total", "tokens", "rows"}


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=6), flush=st.sampled_from([1, 16, 16384]))
def test_second_moment_does_not_depend_on_batching(cuts, flush):
    x = torch.randn(sum(cuts), 5, generator=torch.Generator().manual_seed(0))
    y = torch.randn(sum(cuts), 3, generator=torch.Generator().manual_seed(1))
    statistics = Statistics(CPU, torch.float64)
    own, cross = statistics.second_moment("own", 5), statistics.second_moment("cross", 5, 3)
    num_tokens = statistics.number("num_tokens")
    own.flush_tokens = cross.flush_tokens = flush
    for part_x, part_y in zip(x.split(cuts), y.split(cuts), strict=True):
        own.update(part_x)
        cross.update(part_x, part_y)
        num_tokens.update(len(part_x))
    assert int(num_tokens.value) == len(x)
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


# Sums of float64 differ only by the order of N additions; products of float32 are rounded to 24 bits before they
# are added up, in batches that a cut divides differently.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.mark.parametrize("sums", [torch.float64, torch.float32])
@pytest.mark.parametrize("data", [torch.float64, torch.float32])
@pytest.mark.parametrize("cut", [1, 13, 20, 39])
def test_two_merged_parts_are_the_whole(cut, data, sums):
    whole, first = measured(slice(0, N), data, sums).finish(), measured(slice(0, cut), data, sums)
    first.merge(measured(slice(cut, N), data, sums))
    merged = first.finish()
    assert merged.keys() == whole.keys() == NAMES
    tolerance = max(TOLERANCES[data], TOLERANCES[sums])
    for name, value in whole.items():
        torch.testing.assert_close(merged[name], value, rtol=tolerance, atol=tolerance * N)
    # What is counted or copied is not rounded at all.
    assert float(merged["tokens"]) == N
    assert torch.equal(merged["rows"], inputs_of(data).double())


def test_merging_takes_only_the_sums_that_the_other_has():
    whole = measured(slice(0, N))
    part = Statistics(CPU, torch.float64)
    part.sum("total", C).update(torch.ones(C))
    before = {name: value.clone() for name, value in whole.finish().items()}
    whole.merge(part)
    after = whole.finish()
    assert torch.equal(after["total"], before["total"] + 1)
    for name in NAMES - {"total"}:
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("sums", [torch.float64, torch.float32])
def test_sums_are_finished_in_float64_on_the_cpu(sums):
    for name, value in measured(slice(0, N), torch.float32, sums).finish().items():
        assert (value.dtype, value.device) == (torch.float64, CPU), name


def test_what_was_saved_is_added_to_nothing_without_a_change(tmp_path: Path):
    sums = measured(slice(0, N)).finish()
    save_file(sums, tmp_path / "sums.safetensors")
    again = measured(slice(0, 0))
    again.add(load_file(tmp_path / "sums.safetensors"))
    for name, value in again.finish().items():
        assert torch.equal(value, sums[name]), name
    # Finishing leaves the sums as they are: they go on with the next chunk.
    again.of("total").update(torch.ones(C))
    assert torch.equal(again.finish()["total"], sums["total"] + 1)


def test_a_name_is_given_once():
    statistics = Statistics(CPU, torch.float64)
    statistics.number("tokens")
    with pytest.raises(AssertionError, match="tokens"):
        statistics.sum("tokens", 3)


def test_processes_that_saw_different_tokens_all_have_the_total(tmp_path: Path):
    torch.multiprocessing.spawn(reduce_in_process, (str(tmp_path),), nprocs=2)
    whole = measured(slice(0, N)).finish()
    for rank in range(2):
        reduced = load_file(tmp_path / f"{rank}.safetensors")
        assert reduced.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(reduced[name], value, rtol=1e-12, atol=1e-12 * N)
        assert float(reduced["tokens"]) == N and torch.equal(reduced["rows"], inputs_of(torch.float64))
