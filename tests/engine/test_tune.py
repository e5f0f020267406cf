"""All layers trained together, one in memory: the same as with the whole model in memory, and never for the worse."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from intraslice.results.result import PruneResult, Tuned
from support.family_cases import CASES, family_model
from support.progress import Notes, StopAt
from support.prune import calibration, load, prune, weights_of
from support.tiny import make_tiny

# As if repairs had left a lot to gain.
TUNED: dict[str, Any] = {
    "tune__sites": "all",
    "tune__epochs": 4,
    "tune__learning_rate": 2e-3,
    "attention__repair": "none",
    "ffn__repair": "none",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("m"), num_attention_heads=8, intermediate_size=160)


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PruneResult]:
    """Return a function that prunes to what is then trained."""

    def run(folder: Path, output: Path, **options: Any) -> PruneResult:
        with monkeypatch.context() as patch:
            patch.setattr(
                "intraslice.methods.blockwise.method.tune", lambda *_: Tuned(before=0.0, after=0.0, step=0, steps=0)
            )
            return prune(folder, output, **options, **TUNED)

    return run


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student), summed over positions."""
    logs = functional.log_softmax(student, -1)
    return (functional.softmax(teacher, -1) * (functional.log_softmax(teacher, -1) - logs)).sum()


def test_steps_are_those_of_adam_on_the_whole_model(tmp_path, untuned):
    folder = make_tiny("llama", tmp_path / "m", dtype=torch.float64)
    options: dict[str, Any] = {"sparsity": 0.4, "run__matmul": "exact-gradients"}
    tuned = prune(folder, tmp_path / "tuned", **options, **TUNED)
    assert tuned.tuned is not None
    assert tuned.tuned.step == tuned.tuned.steps == 12  # four times three of the four batches
    untuned(folder, tmp_path / "plain", **options)

    teacher, student = load(folder, dtype=torch.float64), load(tmp_path / "plain", dtype=torch.float64)
    parts = calibration().tokens.split(2)
    weights = [parameter for name, parameter in student.named_parameters() if "layers." in name and "norm" not in name]
    rates = [2e-3 * float(weight.detach().square().mean().sqrt()) for weight in weights]
    adam = torch.optim.Adam([{"params": [weight]} for weight in weights], betas=(0.9, 0.95))

    def mean_divergence() -> float:
        with torch.no_grad():
            return float(divergence(student(parts[3]).logits, teacher(parts[3]).logits)) / parts[3].numel()

    assert math.isclose(tuned.tuned.before, mean_divergence(), rel_tol=1e-9)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(3, generator=generator) for _ in range(4)]).tolist()
    for step, number in enumerate(order):
        factor = (1 - 0.9 ** (step + 1)) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 12)))
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        adam.zero_grad()
        with torch.no_grad():
            wanted = teacher(parts[number]).logits
        divergence(student(parts[number]).logits, wanted).backward()
        adam.step()
    assert math.isclose(tuned.tuned.after, mean_divergence(), rel_tol=1e-7)
    stored, own = weights_of(tmp_path / "tuned"), student.state_dict()
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, own[name], rtol=1e-7, atol=1e-9)


def test_it_lowers_the_divergence_on_sequences_that_it_has_not_seen(folder, tmp_path):
    result = prune(folder, tmp_path / "out", sparsity=0.4, **TUNED)
    assert result.tuned is not None and result.tuned.after < result.tuned.before
    assert PruneResult.load(tmp_path / "out") == result
    assert result.seconds["tune"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"fell from {result.tuned.before:.3f} to {result.tuned.after:.3f}" in card


def test_what_does_not_help_on_held_out_text_changes_nothing(folder, tmp_path, untuned):
    # A step that moves every weight by its own size makes everything worse.
    wild = {**TUNED, "tune__learning_rate": 1.0}
    tuned = prune(folder, tmp_path / "tuned", sparsity=0.4, **wild)
    untuned(folder, tmp_path / "plain", sparsity=0.4)
    assert tuned.tuned is not None
    assert (tuned.tuned.step, tuned.tuned.after) == (0, tuned.tuned.before)
    assert "nothing of it was kept" in (tmp_path / "tuned" / "README.md").read_text()
    first, second = weights_of(tmp_path / "plain"), weights_of(tmp_path / "tuned")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_loss_that_is_not_finite_ends_it_and_loses_nothing(folder, tmp_path, untuned):
    notes = Notes()
    wild = {**TUNED, "tune__learning_rate": 1e30}
    tuned = prune(folder, tmp_path / "tuned", sparsity=0.4, progress=notes, **wild)
    untuned(folder, tmp_path / "plain", sparsity=0.4)
    assert tuned.tuned is not None
    assert tuned.tuned.step == 0 < tuned.tuned.steps < 12
    assert any("its loss is not finite; the weights of step 0 are kept" in note for note in notes.notes)
    first, second = weights_of(tmp_path / "plain"), weights_of(tmp_path / "tuned")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("sites", "path"), [("attention", "self_attn"), ("ffn", "mlp")])
def test_only_the_sites_that_are_named_are_trained(sites, path, folder, tmp_path, untuned):
    prune(folder, tmp_path / "tuned", sparsity=0.4, **{**TUNED, "tune__sites": sites})
    untuned(folder, tmp_path / "plain", sparsity=0.4)
    first, second = weights_of(tmp_path / "plain"), weights_of(tmp_path / "tuned")
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed and all(path in name for name in changed)


@pytest.mark.parametrize(
    ("step", "units"),
    [("tuning", 60), ("what the dense model predicts", 1), ("layers", 1)],
    ids=["in", "before", "layers"],
)
def test_an_interrupted_run_ends_in_the_same_weights(step, units, folder, tmp_path):
    whole = prune(folder, tmp_path / "whole", sparsity=0.4, **TUNED)
    with pytest.raises(KeyboardInterrupt):
        prune(folder, tmp_path / "out", sparsity=0.4, progress=StopAt(step, units), **TUNED)
    again = prune(folder, tmp_path / "out", sparsity=0.4, resume=True, **TUNED)
    assert again.tuned == whole.tuned
    first, second = weights_of(tmp_path / "whole"), weights_of(tmp_path / "out")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "out.partial").exists()


def test_a_finished_training_is_not_repeated(folder, tmp_path, monkeypatch):
    from intraslice.engine import stages

    whole = prune(folder, tmp_path / "whole", sparsity=0.4, **TUNED)
    with monkeypatch.context() as patch:
        patch.setattr(stages.FinishStage, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune(folder, tmp_path / "out", sparsity=0.4, **TUNED)
    monkeypatch.setattr("intraslice.methods.blockwise.method.tune", None)
    again = prune(folder, tmp_path / "out", sparsity=0.4, resume=True, **TUNED)
    assert again.tuned == whole.tuned
    first, second = weights_of(tmp_path / "whole"), weights_of(tmp_path / "out")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", CASES)
def test_every_family(case, tmp_path):
    folder = tmp_path / "m"
    family_model(case, torch.float32).save_pretrained(folder)
    result = prune(folder, tmp_path / "out", on=calibration(4), **{**TUNED, "allocation__rule": "uniform"})
    assert result.tuned is not None and result.tuned.after <= result.tuned.before
    assert torch.isfinite(load(tmp_path / "out")(calibration(4).tokens).logits).all()


def test_sites_that_are_gone_are_left_out(folder, tmp_path):
    drops = {"allocation__drop_blocks": True, "allocation__max_dropped_share": 0.4, "allocation__max_drop_price": 1e9}
    result = prune(folder, tmp_path / "out", sparsity=0.5, **drops, **TUNED)
    assert any(not layer.shape.num_attention_heads or not layer.shape.intermediate_size for layer in result.layers)
    assert result.tuned is not None and result.tuned.after <= result.tuned.before


def test_half_precision_is_stored_as_asked(folder, tmp_path):
    result = prune(folder, tmp_path / "out", sparsity=0.4, run__dtype="bfloat16", **TUNED)
    assert result.tuned is not None and result.tuned.step
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {torch.bfloat16}


def test_states_on_disk_make_no_difference(folder, tmp_path):
    prune(folder, tmp_path / "a", sparsity=0.4, **TUNED)
    prune(folder, tmp_path / "b", sparsity=0.4, run__hidden_states="disk", **TUNED)
    first, second = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_with_one_batch_there_is_nothing_to_judge_by(folder, tmp_path):
    notes = Notes()
    result = prune(folder, tmp_path / "out", on=calibration(1, 32), progress=notes, **TUNED)
    assert result.tuned is None
    assert any("two batches" in note for note in notes.notes)


def test_what_judges_is_not_fitted_to_either(folder, tmp_path, monkeypatch):
    seen: list[int] = []
    from intraslice.methods.blockwise import layer

    real = layer.ffn_moments

    def watched(model, decoder, streams, *rest):
        seen.append(sum(part.stop - part.start for part in streams.pruned.slices()))
        return real(model, decoder, streams, *rest)

    monkeypatch.setattr(layer, "ffn_moments", watched)
    prune(folder, tmp_path / "out", sparsity=0.4, **TUNED)
    # Two of the eight sequences are one batch, the least that can be held out.
    assert set(seen) == {6}
