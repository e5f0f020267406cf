from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from intraslice.errors import CheckpointError, RecipeError
from intraslice.evaluation.bench import RATIO_FIELDS, BenchOptions, bench_models

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
