"""`intraslice bench` as it is called."""

from __future__ import annotations

import pytest

from intraslice.cli.app import main
from intraslice.evaluation import bench
from intraslice.evaluation.bench import BenchOptions


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
