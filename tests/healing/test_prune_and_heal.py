"""`prune --heal`: one command, one output, one record; it survives an interruption in either half."""

from __future__ import annotations

import json

import pytest

import intraslice
from intraslice.cli.app import main
from intraslice.errors import IntraSliceError, NumericalError, OutputError, RecipeError, ResumeMismatchError
from intraslice.results.result import PruneResult
from support.progress import StopAt
from support.prune import fine_steps, weights_of

SIZES = {"calibration.num_samples": 8, "calibration.seqlen": 32, **fine_steps()}


@pytest.fixture
def run(tiny_folder, text, tmp_path):
    """Return a function that prunes and heals with three steps of 2048 tokens."""

    def call(name="out", heal: str | None = "6144", model=None, **more):
        options = {**SIZES, **more.pop("options", {})}
        return intraslice.prune(
            str(model or tiny_folder("llama")),
            output=tmp_path / name,
            sparsity=0.4,
            calibration=str(text),
            heal=heal,
            options=options,
            **more,
        )

    return call


def test_it_is_a_prune_and_then_a_healing(run, tiny_folder, text, tmp_path):
    result = run()
    run("pruned", heal=None)
    settings = {"calibration": str(text), "seqlen": 32, "batch_size": 64}
    intraslice.heal(tmp_path / "pruned", output=tmp_path / "healed", budget="6144", **settings)
    ours, theirs = weights_of(tmp_path / "out"), weights_of(tmp_path / "healed")
    assert all((ours[name] == theirs[name]).all() for name in theirs) and ours.keys() == theirs.keys()
    assert result == PruneResult.load(tmp_path / "out") and result.output == str(tmp_path / "out")
    assert result.healing.teacher == str(tiny_folder("llama")) and result.healing.steps == 3
    assert "heal='6144'" in result.command
    assert not (tmp_path / "out.partial").exists()
    # Nothing that is kept names the work folder, but for the record of what was healed.
    assert ".partial" not in (tmp_path / "out" / "config.json").read_text()
    with pytest.raises(OutputError, match="already exists"):
        run()
    run(overwrite=True)


@pytest.mark.parametrize("step, units", [("layers", 1), ("healing (tokens)", 2048), ("healing (tokens)", 4096)])
def test_interrupted_in_either_half(step, units, run, tmp_path):
    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run(progress=StopAt(step, units))
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="--resume"):
        run()
    with pytest.raises(ResumeMismatchError, match="heal.budget"):
        run(heal="8192", resume=True)
    with pytest.raises(ResumeMismatchError, match="attention.damping"):
        run(options={"attention.damping": 0.02}, resume=True)
    # Without --heal it is another run.
    with pytest.raises(ResumeMismatchError):
        run(heal=None, resume=True)
    run(resume=True)
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_refused_before_anything_is_pruned(run, tmp_path):
    with pytest.raises(RecipeError, match="smaller than one step"):
        run(heal="2047")
    with pytest.raises(RecipeError, match="budget"):
        run(heal="much")
    with pytest.raises(IntraSliceError):
        run(model=tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_healing_that_does_harm_leaves_the_pruned_model(run, tmp_path, monkeypatch):
    from intraslice.healing import options

    monkeypatch.setitem(options.DEFAULT_LR, "full", 1e30)
    with pytest.raises(NumericalError, match="pruned model is in") as caught:
        run()
    pruned = tmp_path / "out.partial" / "pruned"
    assert str(pruned) in str(caught.value) and PruneResult.load(pruned).healing is None


def test_commands(tiny_folder, text, tmp_path, capsys):
    pruned, healed = tmp_path / "pruned", tmp_path / "healed"
    shared = ["--calibration", str(text), "--seqlen", "32"]
    given = ["--sparsity", "0.4", "--num-samples", "8", "--set", "ffn.ffn_multiple=1", *shared]
    given += ["--set", "attention.head_multiple=2"]
    command = ["prune", str(tiny_folder("llama")), "-o", str(pruned), *given, "--heal", "4096"]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["healing"]["steps"] == 2 and "--heal" in printed["healing"]["command"]
    settings = ["--budget", "2048", "--lr", "1e-3", "--held-out", "4"]
    assert main(["heal", str(pruned), "-o", str(healed), *shared, *settings]) == 0
    out = capsys.readouterr()
    assert "held-out KL" in out.out and "held-out KL" in out.err and str(healed) in out.out
    assert main(["heal", str(pruned), "-o", str(healed), "--budget", "ten"]) == 2
    assert "budget 'ten'" in capsys.readouterr().err
    assert main([*command[:-1], "ten"]) == 2
    assert "budget 'ten'" in capsys.readouterr().err
