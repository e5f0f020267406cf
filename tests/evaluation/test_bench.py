from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from intraslice.errors import CheckpointError, RecipeError
from intraslice.loading import load_model
from intraslice.placement import Placement
from intraslice.runtime.configuration_intraslice import CACHE_ARGUMENT
from intraslice.speed.bench import RATIO_FIELDS, BenchOptions, bench_models
from intraslice.speed.timing import Spread
from intraslice.speed.worker import _Bench

CPU = Placement(torch.device("cpu"), torch.float32, torch.float32, torch.float32)
SMALL = BenchOptions(prompt_tokens=16, decode_tokens=4, batch_size=2, repetitions=2)


def test_two_models(tiny_folder):
    folder, smaller = tiny_folder("llama"), tiny_folder("llama", num_hidden_layers=1)
    result = bench_models(str(smaller), str(folder), options=SMALL)
    assert result.base is not None
    # Keys and values of 2 kv heads of 8 channels in float32.
    assert result.model.kv_cache_bytes_per_token == 1 * 2 * 2 * 8 * 4
    assert result.base.kv_cache_bytes_per_token == 3 * 2 * 2 * 8 * 4
    assert result.ratio["kv_cache_bytes_per_token"] == pytest.approx(1 / 3)
    assert set(result.ratio) == set(RATIO_FIELDS)
    assert result.model.weight_bytes == sum(f.stat().st_size for f in smaller.glob("*.safetensors"))
    for speed in (result.model, result.base):
        assert speed.prefill_tokens_per_second > 0
        assert speed.decode_tokens_per_second > 0
        # The process imports torch: more than 50 MB, and far less than this machine has.
        assert 50e6 < speed.peak_memory_bytes < 5e9
    assert result.to_dict()["options"]["repetitions"] == 2


def test_every_batch_size_and_length(tiny_folder):
    folder = str(tiny_folder("llama"))
    options = BenchOptions(kv_lengths=(8, 24), batch_sizes=(1, 3), decode_tokens=2, repetitions=1)
    result = bench_models(folder, folder, options=options)
    assert result.base is not None
    assert [(p.batch_size, p.kv_length) for p in result.model.points] == [(1, 8), (1, 24), (3, 8), (3, 24)]
    for point in result.model.points:
        assert point.kv_cache_bytes == 384 * point.batch_size * point.kv_length
        assert 0 < point.decode.low <= point.decode.median <= point.decode.high
    first, ratio = result.model.points[0], result.point_ratios[3]
    assert first.prefill.median == result.model.prefill_tokens_per_second
    assert ratio.decode == result.model.points[3].decode.median / result.base.points[3].decode.median
    assert len(json.loads(json.dumps(result.to_dict()))["model"]["points"]) == 4


def test_decoding_begins_on_a_cache_of_the_asked_length(tiny_folder):
    model, _ = load_model(str(tiny_folder("llama")), device="cpu")
    lengths = []

    def step(_: object, __: object, kwargs: dict[str, Any]) -> None:
        lengths.append((kwargs["input_ids"].shape[1], kwargs[CACHE_ARGUMENT].get_seq_length()))

    model.register_forward_pre_hook(step, with_kwargs=True)
    with torch.no_grad():
        bench = _Bench(model, CPU, decode_tokens=3, compiled=False)
        measured = bench.repetition(batch_size=2, kv_length=10)
    assert lengths == [(10, 0), (1, 10), (1, 11), (1, 12)]
    assert measured["kv_cache_bytes"] == 384 * 2 * 10


def test_spread_is_the_middle_half():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread(4.0, 3.0, 5.0).relative == 0.25


def test_peak_memory_is_not_that_of_the_parent(tiny_folder):
    ballast = bytearray(600_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    result = bench_models(
        str(tiny_folder("opt")), options=BenchOptions(prompt_tokens=8, decode_tokens=2, repetitions=1)
    )
    del ballast
    assert result.base is None and result.ratio == {}
    assert result.model.peak_memory_bytes < 900_000_000


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs one")
def test_compiled_decoding(tiny_folder):
    options = BenchOptions(prompt_tokens=8, decode_tokens=3, repetitions=1, compile=True)
    result = bench_models(str(tiny_folder("llama")), options=options)
    assert result.model.decode_tokens_per_second > 0


def test_errors_come_out_of_the_process(tiny_folder, tmp_path: Path):
    with pytest.raises(CheckpointError, match="128 positions"):
        bench_models(str(tiny_folder("llama")), options=BenchOptions(prompt_tokens=200, decode_tokens=2))
    with pytest.raises(CheckpointError):
        bench_models(str(tmp_path / "nothing"), options=SMALL)


def test_wrong_options():
    with pytest.raises(RecipeError, match="repetitions"):
        BenchOptions(repetitions=0)
    with pytest.raises(RecipeError, match="kv_lengths must be at least 1, got 8, 0"):
        BenchOptions(kv_lengths=(8, 0))
