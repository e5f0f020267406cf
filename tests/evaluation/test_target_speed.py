"""A speed as the budget: the curve, the shapes, and the way through the command; the clock counts operations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from intraslice import api
from intraslice.cli.app import main
from intraslice.errors import BudgetError, RecipeError, ResumeMismatchError
from intraslice.inspection import family_of
from intraslice.methods.blockwise import target_speed
from intraslice.methods.blockwise.options import AllocationOptions, AttentionOptions, BlockwiseOptions, FFNOptions
from intraslice.methods.blockwise.target_speed import SpeedCurve, choose_sparsity, typical_shape
from intraslice.placement import Placement
from intraslice.recipes.recipe import load_recipe
from intraslice.results.result import PruneResult
from intraslice.runtime.configuration_intraslice import dense_shape
from support.clock import count_operations
from support.tiny import FAMILIES, tiny_config

CPU = Placement(torch.device("cpu"), torch.float32, torch.float32, torch.float32)
FINE = BlockwiseOptions(attention=AttentionOptions(head_multiple=2), ffn=FFNOptions(ffn_multiple=1))
SMALL = [
    "--calibration",
    "builtin",
    "--num-samples",
    "4",
    "--seqlen",
    "32",
    "--set",
    "attention.head_multiple=2",
    "--set",
    "ffn.ffn_multiple=1",
]


@pytest.fixture
def clock_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second is one multiply-add of a matrix product."""
    count_operations(monkeypatch)
    # This clock is always right the first time.
    monkeypatch.setattr(target_speed, "_REPETITIONS", 1)
    monkeypatch.setattr(target_speed, "_STEPS", 1)
    monkeypatch.setattr(target_speed, "KV_LENGTH", 64)


def test_curve_is_exact_at_the_knots():
    curve = SpeedCurve.fit([0.0, 0.25, 0.5, 0.75], [8.0, 7.0, 4.0, 2.0])
    assert [curve.sparsity_for(8.0 / seconds) for seconds in curve.seconds] == [0.0, 0.25, 0.5, 0.75]
    assert curve.best_speedup == 4.0


def test_curve_is_straight_between_the_knots_and_ends_at_the_last():
    curve = SpeedCurve.fit([0.0, 0.5, 1.0], [4.0, 2.0, 1.0])
    assert curve.sparsity_for(4.0 / 3.0) == pytest.approx(0.25)
    assert curve.sparsity_for(4.0 / 1.5) == pytest.approx(0.75)
    assert curve.sparsity_for(4.0) == 1.0
    assert curve.sparsity_for(4.01) is None


def test_noise_does_not_make_the_curve_rise():
    curve = SpeedCurve.fit([0.0, 0.1, 0.2, 0.3, 0.4], [5.0, 6.0, 4.0, 4.4, 3.0])
    assert curve.seconds == pytest.approx((5.5, 5.5, 4.2, 4.2, 3.0))
    wanted = [curve.sparsity_for(1 + step / 100) for step in range(100)]
    found = [sparsity for sparsity in wanted if sparsity is not None]
    assert found == sorted(found) and len(found) < len(wanted)
    # Where the curve is flat, the smallest sparsity is enough.
    assert curve.sparsity_for(5.5 / 4.2) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("attention", "allocation"),
    [
        (AttentionOptions(head_multiple=2), AllocationOptions()),
        (AttentionOptions(head_multiple=2, heads="whole"), AllocationOptions()),
        (AttentionOptions(head_multiple=2, gqa_groups="uniform"), AllocationOptions()),
        (AttentionOptions(head_multiple=2), AllocationOptions(shape_freedom="layer")),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_typical_shapes_have_the_asked_sparsity(family, attention, allocation):
    config = tiny_config(family)
    spec = family_of(config)
    dense = dense_shape(config, spec)
    method = BlockwiseOptions(allocation=allocation, attention=attention, ffn=FFNOptions(ffn_multiple=1))
    whole = spec.num_parameters(dense, 32)
    assert typical_shape(dense, spec, 32, 0.0, method) == dense
    for sparsity in (0.1, 0.3, 0.5, 0.7, 0.9):
        shape = typical_shape(dense, spec, 32, sparsity, method)
        # One channel costs 96 of 9216 weights (llama); only where a single channel is left there is no more to take.
        at_the_end = shape.intermediate_size in (1, dense.intermediate_size)
        assert abs(1 - spec.num_parameters(shape, 32) / whole - sparsity) < 0.006 or at_the_end
        if allocation.shape_freedom == "layer" or attention.gqa_groups == "uniform":
            assert len(set(shape.heads_per_kv)) == 1
        if attention.heads == "whole":
            assert shape.qk_head_dim == dense.qk_head_dim


@pytest.mark.parametrize("speedup_of", ["decode", "prefill"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_sparsity_for_a_speed(family, speedup_of, clock_of_operations):
    config = tiny_config(family, num_hidden_layers=6)
    spec = family_of(config)

    def chosen(speedup: float) -> float:
        return choose_sparsity(config, spec, FINE, speedup=speedup, speedup_of=speedup_of, placement=CPU)

    slower, faster = chosen(1.05), chosen(1.2)
    assert 0 < slower < faster < 0.9
    with pytest.raises(BudgetError, match=f"{speedup_of} 50 times .* at sparsity 0.90.* about [0-9.]+ times as fast"):
        chosen(50)


def test_dry_run_says_which_sparsity(tiny_folder, tmp_path: Path, capfd, monkeypatch, clock_of_operations):
    monkeypatch.chdir(tmp_path)
    arguments = ["prune", str(tiny_folder("llama")), "-o", "out", "--target-speedup", "1.1", *SMALL, "--dry-run"]
    assert main([*arguments, "--json"]) == 0
    captured = capfd.readouterr()
    plan = json.loads(captured.out)
    sparsity = plan["recipe"]["sparsity"]
    assert 0 < sparsity < 0.9 and f"sparsity {sparsity:g}" in captured.err
    assert plan["target_layer_parameters"] == round((1 - sparsity) * 27_648)
    assert list(tmp_path.iterdir()) == []


def test_prune_records_the_choice(tiny_folder, tmp_path: Path, capfd, clock_of_operations):
    out = tmp_path / "out"
    arguments = ["prune", str(tiny_folder("llama")), "-o", str(out), "--target-speedup", "1.1", *SMALL]
    assert main([*arguments, "--speedup-of", "prefill"]) == 0
    assert "for prefill 1.1 times as fast" in capfd.readouterr().out
    result = PruneResult.load(out)
    assert (result.recipe["target_speedup"], result.recipe["speedup_of"]) == (1.1, "prefill")
    assert result.recipe["sparsity"] == result.requested_sparsity
    assert abs(result.sparsity - result.requested_sparsity) <= 0.005


def test_a_resumed_run_does_not_measure_again(tiny_folder, tmp_path: Path, monkeypatch, clock_of_operations):
    out = tmp_path / "out"
    options = {"calibration.source": "builtin", "calibration.num_samples": 4, "calibration.seqlen": 32}
    options |= {"attention.head_multiple": 2, "ffn.ffn_multiple": 1}

    def prune(speedup: float, **kwargs: bool) -> PruneResult:
        folder = str(tiny_folder("llama"))
        return api.prune(folder, output=out, target_speedup=speedup, options=options, **kwargs)

    from intraslice.methods.blockwise import method

    pruned = []

    def stop_at_the_second(*args: object) -> object:
        pruned.append(args)
        if len(pruned) == 2:
            raise KeyboardInterrupt
        return original(*args)  # type: ignore[arg-type]

    original = method.prune_layer
    monkeypatch.setattr(method, "prune_layer", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        prune(1.1)
    monkeypatch.setattr(method, "prune_layer", original)
    begun_with = json.loads((tmp_path / "out.partial" / "manifest.json").read_text())["identity"]["method.sparsity"]

    def measure(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(target_speed, "measure_curve", measure)
    with pytest.raises(ResumeMismatchError, match="target_speedup = 'decode 1.1', this one has 'decode 1.2'"):
        prune(1.2, resume=True)
    result = prune(1.1, resume=True)
    assert result.requested_sparsity == begun_with == result.recipe["sparsity"]


def test_an_unreachable_speed_leaves_nothing_behind(tiny_folder, tmp_path: Path, capfd, clock_of_operations):
    out = tmp_path / "out"
    arguments = ["prune", str(tiny_folder("llama")), "-o", str(out), "--target-speedup", "50", *SMALL]
    assert main(arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and "cannot be reached on this machine" in captured.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"sparsity": 0.3, "target_speedup": 1.5}, "both given"),
        ({}, "--target-speedup 1.5"),
        ({"target_speedup": 1.5, "method": "svd-llm"}, "method svd-llm does not make; give --sparsity"),
        ({"target_speedup": 1}, "target_speedup must be greater than 1, got 1"),
        ({"target_speedup": "nan"}, "greater than 1"),
        ({"target_speedup": "fast"}, "target_speedup must be a number greater than 1, got 'fast'"),
        ({"target_speedup": 1.5, "speedup_of": "training"}, "one of 'decode', 'prefill', got 'training'"),
    ],
)
def test_wrong_targets_are_refused(flags, expected):
    with pytest.raises(RecipeError, match=expected):
        load_recipe(None, {"model": "m", **flags})
