"""`intraslice bench` as it is called."""

from __future__ import annotations

import json

import pytest

from intraslice.cli.app import main
from intraslice.cli.bench import _ranges
from intraslice.speed import bench
from intraslice.speed.bench import BenchOptions, BenchResult, ModelSpeed, PointRatio, PointSpeed
from intraslice.speed.timing import Spread


class _Measured(Exception):
    """Raised instead of measuring."""


@pytest.fixture
def options_of(monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs the command line and returns the options that reach the measuring function."""

    def call(*arguments: str) -> BenchOptions:
        seen: list[BenchOptions] = []

        def measure(*_: object, options: BenchOptions, **__: object) -> None:
            seen.append(options)
            raise _Measured

        monkeypatch.setattr(bench, "bench_models", measure)
        with pytest.raises(_Measured):
            main(["bench", "model", *arguments])
        return seen[0]

    return call


def test_every_flag_reaches_the_measurement(options_of):
    assert options_of() == BenchOptions()
    several = options_of("--kv-lengths", "512, 2048", "--batch-sizes", "1,4")
    assert several.points == [(1, 512), (1, 2048), (4, 512), (4, 2048)]
    flags = "--prompt-tokens 9 --decode-tokens 3 --batch-size 2 --repetitions 4 --device cpu --dtype float32"
    given = options_of(*flags.split(), "--compile", "--trust-remote-code")
    assert given == BenchOptions(
        prompt_tokens=9,
        decode_tokens=3,
        batch_size=2,
        repetitions=4,
        device="cpu",
        dtype="float32",
        compile=True,
        trust_remote_code=True,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--kv-lengths", "512,x"), "512,2048"),
        (("--kv-lengths", ""), "512,2048"),
        (("--batch-sizes", "0"), "batch_sizes must be at least 1"),
        (("--layers", "--kv-lengths", "8,16"), "one KV length"),
        (("--layers", "--compile"), "without --compile"),
    ],
)
def test_wrong_numbers_are_refused(arguments, expected, capfd):
    assert main(["bench", "model", *arguments]) == 2
    line = capfd.readouterr().err.strip()
    assert line.startswith("error: ") and "\n" not in line and expected in line


def test_layers_beyond_learned_positions_are_refused(tiny_folder, capfd):
    assert main(["bench", str(tiny_folder("opt")), "--layers"]) == 2
    assert "--prompt-tokens 64 or less" in capfd.readouterr().err.splitlines()[-1]


def _speed(name: str, points: tuple[PointSpeed, ...]) -> ModelSpeed:
    return ModelSpeed(
        model=name,
        parameters=1000,
        weight_bytes=4000,
        dtype="float32",
        device="cpu",
        prefill_tokens_per_second=points[0].prefill.median,
        decode_tokens_per_second=points[0].decode.median,
        kv_cache_bytes_per_token=64.0,
        peak_memory_bytes=10**8,
        points=points,
    )


def test_table_of_several_lengths(monkeypatch: pytest.MonkeyPatch, capfd):
    points = tuple(
        PointSpeed(
            batch_size=2,
            kv_length=length,
            prefill=Spread(3000.0, 2940.0, 3060.0),
            decode=Spread(50.0, 49.0, 52.0),
            kv_cache_bytes=128 * length,
        )
        for length in (512, 2048)
    )
    ratios = tuple(PointRatio(batch_size=2, kv_length=n, prefill=1.5, decode=1.25) for n in (512, 2048))
    model, base = _speed("small", points), _speed("big", points)
    result = BenchResult(model=model, base=base, ratio={}, point_ratios=ratios, options=BenchOptions())
    monkeypatch.setattr(bench, "bench_models", lambda *_, **__: result)
    assert main(["bench", "small", "--against", "big"]) == 0
    lines = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    assert "2 512 3,000.0 +-2% 3,000.0 +-2% 1.500 50.0 +-3% 50.0 +-3% 1.250 65.5 kB" in lines
    assert any(line.startswith("2 2048 ") and line.endswith("262.1 kB") for line in lines)


def test_layers_table_and_json(tiny_folder, capfd):
    folder = str(tiny_folder("llama"))
    arguments = ["--layers", "--prompt-tokens", "8", "--decode-tokens", "2", "--repetitions", "1"]
    assert main(["bench", folder, "--against", folder, *arguments]) == 0
    out = capfd.readouterr().out
    assert "0-2" in out and "times as fast" in out
    assert main(["bench", folder, *arguments, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["base"] is None and result["speedup"] == {}
    assert result["model"]["shapes"][0]["layers"] == [0, 1, 2]


def test_ranges_of_layers():
    assert _ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
