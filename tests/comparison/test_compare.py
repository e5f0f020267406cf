"""Comparisons of tiny models through the command line; `jobs` are what would be processes of their own."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from intraslice.cli.app import main
from intraslice.comparison import run, store
from intraslice.evaluation.paired import difference
from support.small_comparison import INTRASLICE, SMALL, document_of
from support.task_rows import write_tasks

Jobs = list[dict[str, Any]]
Small = Callable[..., Path]


def names(jobs: Jobs) -> list[str]:
    return [job["job"] for job in jobs]


def prunes(jobs: Jobs) -> list[tuple[str, float]]:
    return [(job["recipe"]["method"], job["recipe"]["sparsity"]) for job in jobs if job["job"] == "prune"]


def main_cells(document: dict[str, Any]) -> list[tuple[str, float]]:
    return [(cell["label"], cell["asked"]) for cell in document["cells"] if cell["sweep"] is None]


def test_whole_comparison(finished_folder: tuple[Path, Jobs]):
    folder, jobs = finished_folder
    assert names(jobs) == ["identify", "measure", *["prune", "measure"] * 4]
    document = document_of(folder)
    assert main_cells(document) == [
        ("dense", 0.0),
        *((label, sparsity) for sparsity in (0.2, 0.4) for label in ("intraslice", "whole heads")),
    ]
    dense, *pruned = document["cells"]
    assert dense["method"] == "dense" and dense["prune"] is None and dense["sparsity"] == 0
    assert all(layer["num_attention_heads"] == 4 and layer["errors"] == {} for layer in dense["layers"])
    for cell in pruned:
        assert abs(cell["sparsity"] - cell["asked"]) < 0.005
        assert cell["layer_parameters"] == sum(layer["num_parameters"] for layer in cell["layers"])
        assert cell["parameters"] < dense["parameters"] and cell["weight_bytes"] < dense["weight_bytes"]
        assert cell["perplexity"] > 1 and cell["perplexity"] != dense["perplexity"]
        assert cell["prune"]["peak_memory_bytes"] > 0 and cell["prune"]["seconds"]["total"] > 0
        assert set(cell["layers"][0]["errors"]) == {"attention", "ffn"}
        assert cell["tasks"] is cell["average"] is cell["speed"] is cell["effective_rank"] is None
    assert len({cell["key"] for cell in document["cells"]}) == 5
    assert len(list((folder / "cells").iterdir())) == 5
    # Checkpoints go when they are measured; the gradient pass, which both methods share, stays.
    assert list((folder / "checkpoints").iterdir()) == []
    assert len(list((folder / "scans").iterdir())) == 1


@pytest.mark.parametrize("stopped", ["measure", "prune", "part", "delete"])
def test_a_comparison_that_was_stopped_is_repeated(
    stopped: str, jobs: Jobs, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before a row is in its tables; in a cell; behind a checkpoint; while it deletes the checkpoint of a cell."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("Some words, and some more words. " * 100)
    calibration = {"source": str(text), "num_samples": 4, "seqlen": 32}
    evaluation = {"text": str(text), "seqlen": 64, "windows": 2}
    file = small(methods=["naive"], sparsities=[0.3], calibration=calibration, evaluation=evaluation)
    run_job = run.run_job

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stopped == "delete":
            patch.setattr(store, "delete_published", stop)
        elif stopped == "part":
            keep = store.Store.keep_part
            patch.setattr(
                store.Store,
                "keep_part",
                lambda self, name, *rest: (stop if name == "prune" else keep)(self, name, *rest),
            )
        else:
            patch.setattr(run, "run_job", lambda job, *rest: stop() if job["job"] == stopped else run_job(job, *rest))
        assert main(["compare", str(file), "-o", str(out)]) == 130
    assert main(["compare", str(file), "-o", str(out)]) == 0
    assert names(jobs).count("prune") == 1
    assert main_cells(document_of(out)) == [("dense", 0.0), ("naive", 0.3)]
    assert list((out / "checkpoints").iterdir()) == [] and len(list((out / "parts").glob("prune-*"))) == 1


def test_all_variants_share_their_calibration(finished_folder: tuple[Path, Jobs]):
    folder, _ = finished_folder
    parts = [json.loads(path.read_text()) for path in (folder / "parts").glob("prune-*.json")]
    assert len(parts) == 4
    (fingerprint,) = {part["result"]["calibration"]["fingerprint"] for part in parts}
    assert list(document_of(folder)["protocol"]["calibration"]["tokens"].values()) == [fingerprint]


def test_perplexity_is_that_of_eval(finished_folder: tuple[Path, Jobs], tiny_folder: Callable[..., Path], capfd):
    arguments = ("--text", "builtin", "--seqlen", "64", "--windows", "2", "--json")
    assert main(["eval", str(tiny_folder("llama")), *arguments]) == 0
    measured = json.loads(capfd.readouterr().out)["perplexity"]
    assert document_of(finished_folder[0])["cells"][0]["perplexity"] == measured


def test_tables(finished_folder: tuple[Path, Jobs]):
    folder, _ = finished_folder
    cells = document_of(folder)["cells"]
    rows = json.loads((folder / "table.json").read_text())
    assert [(row["method"], row["asked"]) for row in rows] == [(cell["label"], cell["asked"]) for cell in cells]
    for row, cell in zip(rows, cells, strict=True):
        assert row["perplexity"] == cell["perplexity"] and row["parameters"] == cell["parameters"]
        assert row["prune_seconds"] == (cell["prune"]["seconds"]["total"] if cell["prune"] else None)
    with open(folder / "table.csv") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(rows[0])
    assert [float(row["perplexity"]) for row in table] == [cell["perplexity"] for cell in cells]
    assert table[0]["peak_memory_bytes"] == "" and float(table[1]["peak_memory_bytes"]) > 0
    lines = (folder / "table.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| model"))
    # What was not measured has no column.
    assert "perplexity" in head and "prune, s" in head and "decode" not in head and "average" not in head
    assert sum("whole heads" in line for line in lines if line.startswith("|")) == 2
    assert any(line.startswith("- calibration: source builtin, num_samples 4") for line in lines)
    assert "Small" in (folder / "report.html").read_text()


def test_second_run_does_nothing(finished: Path, small: Small, jobs: Jobs):
    before = {path: path.stat().st_mtime_ns for path in (finished / "parts").iterdir()}
    assert main(["compare", str(small()), "-o", str(finished)]) == 0
    assert names(jobs) == ["identify"]
    assert {path: path.stat().st_mtime_ns for path in (finished / "parts").iterdir()} == before


def test_what_is_added_is_all_that_runs(finished: Path, small: Small, jobs: Jobs, capfd):
    file = small(sparsities=[0.2, 0.3, 0.4], methods=[*SMALL["methods"], "ada-h"])
    assert main(["compare", str(file), "-o", str(finished), "--dry-run", "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)["cells"]
    added = [("ada-h", 0.2), ("intraslice", 0.3), ("naive", 0.3), ("ada-h", 0.3), ("ada-h", 0.4)]
    assert [cell["asked"] for cell in plan if cell["run"]] == [sparsity for _, sparsity in added]
    assert main(["compare", str(file), "-o", str(finished)]) == 0
    assert prunes(jobs) == added
    assert len(document_of(finished)["cells"]) == 10
    # The gradient pass is that of the first run.
    assert len(list((finished / "scans").iterdir())) == 1


def test_another_evaluation_prunes_again_and_the_plan_says_so(finished: Path, small: Small, jobs: Jobs, capfd):
    file = small(evaluation={"seqlen": 64, "windows": 3}, sparsities=[0.2], methods=[INTRASLICE])
    assert main(["compare", str(file), "-o", str(finished), "--dry-run"]) == 0
    assert "1 cells are pruned again" in capfd.readouterr().out
    assert names(jobs) == ["identify"]


def test_kept_checkpoints_are_measured_without_another_prune(small: Small, jobs: Jobs, tmp_path: Path, capfd):
    wanted = {"sparsities": [0.2], "methods": ["intraslice"], "keep_checkpoints": True}
    assert main(["compare", str(small(**wanted)), "-o", str(tmp_path / "out")]) == 0
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert main(["inspect", str(checkpoint)]) == 0
    wanted["evaluation"] = {"seqlen": 64, "windows": 3}
    assert main(["compare", str(small(**wanted)), "-o", str(tmp_path / "out")]) == 0
    assert len(prunes(jobs)) == 1


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(small: Small, jobs: Jobs, tmp_path: Path, capfd):
    capped = {"label": "capped", "method": "intraslice", "options": {"allocation.max_site_sparsity": 0.3}}
    file = small(methods=[capped, "intraslice"], sparsities=[0.2, 0.4])
    assert main(["compare", str(file), "-o", str(tmp_path / "out")]) == 1
    assert "1 of 5 cells failed" in capfd.readouterr().err
    cells = document_of(tmp_path / "out")["cells"]
    (failed,) = [cell for cell in cells if cell.get("error")]
    assert (failed["label"], failed["asked"], failed["perplexity"]) == ("capped", 0.4, None)
    assert "30%" in failed["error"]
    assert [cell["perplexity"] is None for cell in cells] == [cell is failed for cell in cells]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| failed |" in table and f"capped at 0.4: {failed['error']}" in table
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []
    # It may have been a full disk: a failure is tried again.
    del jobs[:]
    assert main(["compare", str(file), "-o", str(tmp_path / "out")]) == 1
    assert prunes(jobs) == [("intraslice", 0.4)] and "measure" not in names(jobs)


def test_a_sweep_of_the_calibration_is_a_section_of_its_own(finished: Path, small: Small, jobs: Jobs):
    sweep = {"option": "calibration.num_samples", "values": [2, 4], "method": "whole heads", "sparsity": 0.2}
    assert main(["compare", str(small(sweeps=[sweep])), "-o", str(finished)]) == 0
    document = document_of(finished)
    swept = [cell for cell in document["cells"] if cell["sweep"] is not None]
    assert [cell["sweep"]["value"] for cell in swept] == [2, 4]
    # Four samples are what the table has: its prune and perplexity are taken over.
    assert prunes(jobs) == [("naive", 0.2)]
    in_table = next(cell for cell in document["cells"] if cell["label"] == "whole heads")
    assert swept[1]["perplexity"] == in_table["perplexity"] != swept[0]["perplexity"]
    assert len(json.loads((finished / "table.json").read_text())) == 5
    table = (finished / "table.md").read_text()
    assert "## calibration.num_samples" in table and "whole heads at 0.2" in table


def test_two_runs_in_one_folder_are_refused(finished: Path, small: Small, jobs: Jobs, capfd):
    from intraslice.comparison.store import Store

    with Store(finished).locked():
        assert main(["compare", str(small()), "-o", str(finished)]) == 2
    assert "another comparison is running" in capfd.readouterr().err


def test_calibration_that_changes_meanwhile_is_a_failure(
    small: Small, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = tmp_path / "text.txt"
    text.write_text("One sentence after the other. " * 50)
    from intraslice.comparison import run

    run_job = run.run_job

    def change_before_the_prune(job: dict[str, Any], *arguments: Any) -> Any:
        if job["job"] == "prune":
            text.write_text("Quite another text than before! " * 50)
        return run_job(job, *arguments)

    monkeypatch.setattr(run, "run_job", change_before_the_prune)
    # Relative to the YAML file, not to where the command runs.
    file = small(
        calibration={"source": "text.txt", "num_samples": 4, "seqlen": 32}, sparsities=[0.2], methods=["naive"]
    )
    assert main(["compare", str(file), "-o", str(tmp_path / "out")]) == 1
    assert "has changed" in document_of(tmp_path / "out")["cells"][1]["error"]


def test_speed_beside_the_dense_model(small: Small, jobs: Jobs, tmp_path: Path):
    speed = {"prompt_tokens": 8, "decode_tokens": 2, "repetitions": 1}
    file = small(sparsities=[0.4], methods=["naive"], speed=speed)
    assert main(["compare", str(file), "-o", str(tmp_path / "out")]) == 0
    dense, pruned = document_of(tmp_path / "out")["cells"]
    assert dense["speed"]["decode_speedup"] == 1 and pruned["speed"]["decode_speedup"] > 0
    assert pruned["speed"]["kv_cache_bytes_per_token"] < dense["speed"]["kv_cache_bytes_per_token"]
    assert document_of(tmp_path / "out")["protocol"]["speed"]["prompt_tokens"] == 8
    assert "decode, tok/s" in (tmp_path / "out" / "table.md").read_text()


def _task_data(folder: Path) -> Path:
    folder.mkdir()
    rows = [{"goal": f"Count to {n}.", "sol1": "One, two.", "sol2": "Red, blue.", "label": n % 2} for n in range(4)]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_tasks_that_are_added_leave_the_perplexity_alone(finished: Path, small: Small, jobs: Jobs, tmp_path: Path):
    pytest.importorskip("lm_eval")
    _task_data(tmp_path / "data")
    tasks = {"names": ["piqa"], "task_data": "data", "limit": 4}
    file = small(tasks=tasks, sparsities=[0.2], methods=[INTRASLICE])
    assert main(["compare", str(file), "-o", str(finished)]) == 0
    assert [job["parts"] for job in jobs if job["job"] == "measure"] == [["task-piqa"], ["task-piqa"]]
    document = document_of(finished)
    for cell in document["cells"]:
        assert cell["tasks"]["piqa"]["samples"] == 4 and cell["average"] == cell["tasks"]["piqa"]["acc_norm"]
    assert document["protocol"]["tasks"]["limit"] == 4
    assert "piqa" in (finished / "table.csv").read_text().splitlines()[0]


def test_analysis(finished: Path, small: Small, jobs: Jobs):
    assert main(["compare", str(small(analysis=True, sparsities=[0.2])), "-o", str(finished)]) == 0
    document = document_of(finished)
    assert all(len(cell["effective_rank"]) == 3 for cell in document["cells"])
    (found,) = document["analysis"].values()
    assert len(found["act_spectrum"]) == 3
    del jobs[:]
    assert main(["compare", str(small(analysis=True, sparsities=[0.2])), "-o", str(finished)]) == 0
    assert names(jobs) == ["identify"]


def parts_of(folder: Path) -> set[str]:
    return {path.name for path in (folder / "parts").iterdir()}


def test_an_added_text_is_all_that_is_measured(finished: Path, small: Small, jobs: Jobs, tmp_path: Path, capfd):
    options = {"sparsities": [0.2], "methods": [INTRASLICE], "keep_checkpoints": True}
    measured = SMALL["evaluation"]
    file = small(**options, evaluation={**measured, "texts": ["late=builtin@3-4"]})
    assert main(["compare", str(file), "-o", str(finished)]) == 0
    before = parts_of(finished)
    (tmp_path / "own.txt").write_text("some words that no other text has. " * 30)
    file = small(**options, evaluation={**measured, "texts": ["late=builtin@3-4", "own.txt@0-1"], "divergence": True})
    jobs.clear()
    assert main(["compare", str(file), "-o", str(finished)]) == 0
    assert names(jobs) == ["identify", "measure", "measure"]
    assert [job["parts"] for job in jobs[1:]] == [
        ["text-own"],
        ["text-own", "divergence-builtin", "divergence-late", "divergence-own"],
    ]
    assert before < parts_of(finished)
    dense, pruned = document_of(finished)["cells"]
    assert list(pruned["texts"]) == ["builtin", "late", "own"] and pruned["texts"]["builtin"] == pruned["perplexity"]
    gaps = {name: math.log(value / dense["texts"][name]) for name, value in pruned["texts"].items()}
    assert pruned["gaps"] == gaps and pruned["mean_gap"] == sum(gaps.values()) / 3
    each = [pruned["divergence"][name] for name in gaps]
    assert all(one["kl"] > 0 and 0 < one["agreement"] <= 1 for one in each)
    assert pruned["mean_kl"] == sum(one["kl"] for one in each) / 3
    assert "gaps" not in dense and dense["divergence"] is None
    table = (finished / "table.md").read_text()
    assert "mean gap" in table and "gap on late" in table and "- text own: own.txt, windows 0-1" in table
    assert "Perplexity by text" in (finished / "report.html").read_text()
    # The number of `eval --against`.
    checkpoint = next((finished / "checkpoints").glob("*intraslice*"))
    arguments = ["--text", "late=builtin@3-4", "--seqlen", "64", "--against", jobs[0]["models"][0], "--json"]
    capfd.readouterr()
    assert main(["eval", str(checkpoint), *arguments]) == 0
    (score,) = json.loads(capfd.readouterr().out)["texts"]
    assert score["kl"] == pruned["divergence"]["late"]["kl"] and score["gap"] == pytest.approx(gaps["late"])


def test_texts_that_are_wrong_stop_before_anything_runs(small: Small, tmp_path: Path, jobs: Jobs, capfd):
    file = small(evaluation={**SMALL["evaluation"], "texts": ["late=builtin@99999-"]})
    assert main(["compare", str(file), "-o", str(tmp_path / "out")]) == 2
    assert "there is no window 99999" in capfd.readouterr().err
    file = small(evaluation={**SMALL["evaluation"], "texts": ["builtin"]})
    assert main(["compare", str(file), "-o", str(tmp_path / "out")]) == 2
    assert "two texts are called 'builtin'" in capfd.readouterr().err
    assert names(jobs) == ["identify"]


def test_accuracies_are_paired_with_those_of_the_dense_model(small: Small, tmp_path: Path, jobs: Jobs):
    data = write_tasks(tmp_path / "data")
    tasks = {"names": ["arc_easy", "piqa"], "task_data": str(data)}
    assert (
        main(["compare", str(small(sparsities=[0.4], methods=[INTRASLICE], tasks=tasks)), "-o", str(tmp_path / "o")])
        == 0
    )
    dense, pruned = document_of(tmp_path / "o")["cells"]
    stored = {}
    for path in (tmp_path / "o" / "cells").iterdir():
        cell = json.loads(path.read_text())["cell"]
        stored[cell["label"]] = {name: task["answers"] for name, task in cell["tasks"].items()}
    assert len(stored["dense"]["arc_easy"]) == 3
    found = difference(stored["intraslice"]["piqa"], stored["dense"]["piqa"])
    assert pruned["paired"]["tasks"]["piqa"] == {"difference": found.difference, "stderr": found.stderr}
    assert pruned["paired"]["average"]["difference"] == pytest.approx(pruned["average"] - dense["average"])
    # Thousands of answers have no place in a report.
    assert all("answers" not in task for cell in (dense, pruned) for task in cell["tasks"].values())
    assert "minus dense" in (tmp_path / "o" / "table.md").read_text()


def test_a_mixture_with_text_of_the_model(small: Small, tmp_path: Path, jobs: Jobs):
    (tmp_path / "own.txt").write_text("some words that no other text has. " * 30)
    calibration = {"source": "self:1,own.txt:1", "num_samples": 4, "seqlen": 32}
    options = {"sparsities": [0.2], "methods": ["naive"], "calibration": calibration}
    assert main(["compare", str(small(**options)), "-o", str(tmp_path / "out")]) == 0
    document = document_of(tmp_path / "out")
    assert [bool(cell.get("error")) for cell in document["cells"]] == [False, False]
    assert document["protocol"]["calibration"]["source"] == "self:1,own.txt:1"
    jobs.clear()
    assert main(["compare", str(small(**options)), "-o", str(tmp_path / "out")]) == 0
    assert names(jobs) == ["identify"]
    (tmp_path / "own.txt").write_text("other words that no other text has. " * 30)
    assert main(["compare", str(small(**options)), "-o", str(tmp_path / "out")]) == 0
    assert prunes(jobs) == [("naive", 0.2)]


HEAL = {"budget": "512", "seqlen": 32, "batch_size": 4, "held_out": 4, "lr": 1e-3, "evaluate_every": 2}


def test_every_method_is_healed_with_one_budget(small: Small, jobs: Jobs, tmp_path: Path, capfd):
    text = tmp_path / "own.txt"
    text.write_text("".join(f"{number}. the quick brown fox jumps over the lazy dog; " for number in range(300)))
    wanted: dict[str, Any] = {
        "sparsities": [0.4],
        "calibration": {**SMALL["calibration"], "source": str(text)},
        "evaluation": {"text": f"{text}", "seqlen": 64, "windows": 2, "texts": ["builtin@0-1"]},
    }
    out = tmp_path / "healed"
    assert main(["compare", str(small(**wanted, heal=HEAL)), "-o", str(out)]) == 0
    assert names(jobs) == ["identify", "measure", *["prune", "measure", "heal", "measure"] * 2]
    document = document_of(out)
    assert [cell["label"] for cell in document["cells"]] == [
        *("dense", "intraslice", "intraslice, healed", "whole heads", "whole heads, healed")
    ]
    assert len({cell["key"] for cell in document["cells"]}) == 5
    for pruned, healed in zip(document["cells"][1::2], document["cells"][2::2], strict=True):
        assert healed["healing"][-1]["tokens"] == 512 and "healing" not in pruned
        # Random models predict nothing, so a perplexity says little: it is not the same, and the dense model is nearer.
        assert healed["perplexity"] != pruned["perplexity"]
        assert min(point["kl"] for point in healed["healing"][1:]) < healed["healing"][0]["kl"]
        assert pruned["healed"] == {name: healed[name] for name in ("perplexity", "mean_gap", "average")}
        seconds = healed["prune"]["seconds"]
        assert seconds["total"] == pytest.approx(pruned["prune"]["seconds"]["total"] + seconds["healing"])
        assert healed["speed"] is None and healed["layers"] == pruned["layers"]
    table = (out / "table.md").read_text()
    assert "healed, perplexity" in table and "- heal: " in table and "budget 512" in table
    assert "mean log gap" in (out / "report.html").read_text()
    assert list((out / "checkpoints").iterdir()) == []
    # Finished work is not repeated, and the cells without healing know nothing of it.
    for changes, expected in (({"heal": HEAL}, []), ({}, []), ({"heal": {**HEAL, "budget": 640}}, ["prune", "heal"])):
        capfd.readouterr()
        assert main(["compare", str(small(**wanted, **changes)), "-o", str(out), "--dry-run", "--json"]) == 0
        plan = json.loads(capfd.readouterr().out)["cells"]
        assert plan[2]["run"][:2] == expected if "heal" in changes else len(plan) == 3
        assert all(not cell["run"] for cell in plan if "healed" not in cell["label"])


def test_a_model_that_healing_does_not_help_fails_alone(small: Small, jobs: Jobs, tmp_path: Path):
    file = small(sparsities=[0.4], methods=[INTRASLICE], heal={**HEAL, "lr": 10.0})
    assert main(["compare", str(file), "-o", str(tmp_path / "out")]) == 1
    dense, pruned, healed = document_of(tmp_path / "out")["cells"]
    assert "healing has not helped" in healed["error"] and pruned["perplexity"] and "healed" not in pruned


def test_healing_that_cannot_run_here_is_refused_before_the_first_prune(
    small: Small, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    file = small(heal=HEAL, options={"run.device": "cuda:1"})
    assert main(["compare", str(file), "-o", str(tmp_path / "out")]) == 2
    assert "healing runs on the first accelerator" in capsys.readouterr().err
    assert names(jobs) == ["identify"] and not (tmp_path / "out").exists()
