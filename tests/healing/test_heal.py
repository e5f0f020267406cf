"""A healed checkpoint is one like any other: same files, names, shapes and dtypes, and nearer to its dense model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer

from intraslice.checkpoint.ownership import LIST_FILE
from intraslice.comparison.merge import merge_results
from intraslice.exporters.export import export_checkpoint
from intraslice.exporters.options import ExportOptions
from intraslice.healing.trainer import HealTrainer
from intraslice.report import render_report
from intraslice.results.result import PruneResult
from intraslice.runtime.families_intraslice import FAMILIES
from support.processes import AUTO, BLOCK_PACKAGE, LOAD_ALL, check_logits, run_python
from support.progress import Notes
from support.prune import load, logits, weights_of
from support.text import WORDS

TOKENS = torch.arange(256).view(8, 32)


def kl(student, teacher):
    """Return the divergence on text like that of the healing, as long: later positions are never trained."""
    text = "".join(f"{number}. {WORDS}" for number in range(200, 210))
    ids = torch.tensor(AutoTokenizer.from_pretrained(student).encode(text)[:512]).view(16, 32)
    ours, theirs = (logits(folder, ids).log_softmax(-1) for folder in (student, teacher))
    return float(functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean())


def forms(folder):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights_of(folder).items()}


def changed(before, after):
    old, new = weights_of(before), weights_of(after)
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3", "opt", "gpt2", "falcon"])
def test_every_family_gets_nearer_to_its_dense_model(family, pruned_folder, tiny_folder, heal):
    pruned, dense = pruned_folder(family), tiny_folder(family)
    result = heal(pruned)
    healed = Path(result.output)
    assert forms(pruned) == forms(healed)
    assert result.record.best.kl < 0.9 * result.record.kl_before
    assert kl(healed, dense) < kl(pruned, dense)
    assert (healed / "config.json").read_bytes() == (pruned / "config.json").read_bytes()
    assert {path.name for path in healed.iterdir()} == {path.name for path in pruned.iterdir()}
    assert not healed.with_name("healed.partial").exists()


def test_record_and_card(pruned_folder, tiny_folder, heal):
    pruned = pruned_folder()
    result = heal(pruned, command="intraslice heal")
    before, after = PruneResult.load(pruned), PruneResult.load(result.output)
    assert before.healing is None and after.healing == result.record
    assert after.layers == before.layers and after.output == result.output
    record = result.record
    assert [point.step for point in record.curve] == [0, 4, 8, 12] and record.steps == 12
    assert [point.tokens for point in record.curve] == [0, 512, 1024, 1536]
    assert record.curve[0].loss is None and all(point.loss > 0 for point in record.curve[1:])
    assert record.best.kl == min(point.kl for point in record.curve)
    assert record.teacher == str(tiny_folder("llama")) and record.stopped is None
    assert record.calibration["held_out"] == 4 and record.calibration["num_samples"] == 48
    card = (Path(result.output) / "README.md").read_text()
    assert "1,536 tokens" in card and f"{record.kl_before:.3f}" in card and f"{record.best.kl:.3f}" in card


def test_it_loads_without_the_package(pruned_folder, heal, tmp_path):
    root = tmp_path / "all"
    root.mkdir()
    heal(pruned_folder(), output=root / "healed")
    (root / "ids.json").write_text(json.dumps(TOKENS.tolist()))
    expected = {"healed": logits(root / "healed", TOKENS)}
    code = BLOCK_PACKAGE + LOAD_ALL.format(imports=AUTO, arguments="trust_remote_code=True")
    run_python("import sys\n" + code, root, tmp_path)
    check_logits(root, expected)


def test_exporters_read_it(tiny_folder, pruned_folder, heal, tmp_path):
    result = heal(pruned_folder())
    report = export_checkpoint(result.output, "padded", tmp_path / "padded", ExportOptions())
    assert report.max_logit_difference < 1e-3
    # A stock folder can be healed as well, if its teacher is named.
    again = heal(tmp_path / "padded", output=tmp_path / "stock", teacher=str(tiny_folder("llama")))
    assert forms(tmp_path / "padded") == forms(tmp_path / "stock")
    stored = json.loads((tmp_path / "stock" / "healing.json").read_text())
    assert stored == json.loads(json.dumps(again.record.to_dict()))


def test_embeddings_stay_unless_asked(pruned_folder, heal, tmp_path):
    pruned = pruned_folder()
    heal(pruned)
    names = changed(pruned, tmp_path / "healed")
    assert "model.layers.0.mlp.down_proj.weight" in names and "model.norm.weight" in names
    assert not names & {"model.embed_tokens.weight", "lm_head.weight"}
    heal(pruned, output=tmp_path / "all", train_embeddings=True)
    assert changed(pruned, tmp_path / "all") >= {"model.embed_tokens.weight", "lm_head.weight"}


def test_tied_embeddings_are_trained_as_one(pruned_folder, heal, tmp_path):
    pruned = pruned_folder("llama", tie_word_embeddings=True)
    heal(pruned, train_embeddings=True)
    assert "lm_head.weight" not in weights_of(tmp_path / "healed")
    assert "model.embed_tokens.weight" in changed(pruned, tmp_path / "healed")
    assert forms(pruned) == forms(tmp_path / "healed")


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_lora_is_merged(family, pruned_folder, tiny_folder, heal, tmp_path):
    pruned, dense = pruned_folder(family), tiny_folder(family)
    result = heal(pruned, weights="lora", rank=4, lr=5e-3)
    assert forms(pruned) == forms(tmp_path / "healed")
    assert kl(tmp_path / "healed", dense) < kl(pruned, dense)
    names = changed(pruned, tmp_path / "healed")
    spec = FAMILIES[family]
    paths = {path for reading, writing in (spec.attention_paths, spec.ffn_paths) for path in (*reading, writing)}
    assert names and all(name.endswith(tuple(f"{path}.weight" for path in paths)) for name in names)
    # What was measured during the training is what was merged and saved.
    full = heal(pruned, output=tmp_path / "full")
    assert result.record.trained_parameters < full.record.trained_parameters
    assert load(tmp_path / "healed").num_parameters() == load(pruned).num_parameters()


@pytest.mark.parametrize("method, sparsity", [("svd-llm", 0.4), ("slicegpt", 0.398)])
def test_other_forms_of_layers_heal_too(method, sparsity, pruned_folder, heal, tmp_path):
    pruned = pruned_folder(method=method, sparsity=sparsity)
    for weights in ("full", "lora"):
        result = heal(pruned, output=tmp_path / weights, weights=weights)
        assert result.record.best.kl < result.record.kl_before
        assert forms(pruned) == forms(tmp_path / weights)


def test_half_precision_checkpoints_keep_their_dtype(tiny_folder, pruned_folder, heal, tmp_path):
    pruned = pruned_folder(dtype=torch.bfloat16)
    result = heal(pruned)
    assert result.record.best.kl < result.record.kl_before and forms(pruned) == forms(tmp_path / "healed")
    heal(pruned, output=tmp_path / "wide", dtype="float32")
    assert {dtype for _, dtype in forms(tmp_path / "wide").values()} <= {torch.float32, torch.int64, torch.int32}
    assert load(tmp_path / "wide").dtype == torch.float32
    assert PruneResult.load(tmp_path / "wide").dtype == "float32"


def test_other_losses(pruned_folder, heal, tmp_path):
    plain = heal(pruned_folder())
    hidden = heal(pruned_folder(), output=tmp_path / "hidden", hidden_weight=0.1)
    task = heal(pruned_folder(), output=tmp_path / "task", task_weight=0.01)
    assert plain.record.curve[0].kl == hidden.record.curve[0].kl == task.record.curve[0].kl
    assert plain.record.curve[1].loss < hidden.record.curve[1].loss
    assert plain.record.curve[1].loss < task.record.curve[1].loss
    assert hidden.record.best.kl < hidden.record.kl_before


def test_accumulation_changes_no_step(pruned_folder, heal, tmp_path):
    heal(pruned_folder())
    heal(pruned_folder(), output=tmp_path / "pieces", accumulate=4)
    one, other = weights_of(tmp_path / "healed"), weights_of(tmp_path / "pieces")
    for name, tensor in one.items():
        # Adam makes a large step of a gradient near zero, whose rounding differs.
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=2e-3)


def test_the_same_seed_gives_the_same_weights(pruned_folder, heal, tmp_path):
    for weights in ("full", "lora"):
        outputs = [tmp_path / f"{weights}-{run}" for run in range(2)]
        for output in outputs:
            torch.manual_seed(len(output.name) + outputs.index(output))
            heal(pruned_folder(), output=output, weights=weights)
        assert not changed(*outputs)
    heal(pruned_folder(), output=tmp_path / "other", seed=1)
    assert changed(tmp_path / "full-0", tmp_path / "other")


def test_the_best_weights_are_kept_when_it_gets_worse(pruned_folder, heal, tiny_folder, monkeypatch):
    measured = HealTrainer.held_out

    def worse_at_the_end(trainer, *args):
        # How a real training diverges depends on rounding; here it does after the eighth step, wherever it runs.
        return measured(trainer, *args) * (100 if trainer.state.global_step > 8 else 1)

    monkeypatch.setattr(HealTrainer, "held_out", worse_at_the_end)
    notes, pruned = Notes(), pruned_folder()
    result = heal(pruned, budget="51200", progress=notes)
    record = result.record
    assert record.stopped is not None and "divergence rose" in record.stopped
    assert record.best_step == 8 and record.curve[-1].step == 12
    assert any("stopped early" in note for note in notes.notes)
    assert record.best.kl < record.kl_before < record.curve[-1].kl
    assert PruneResult.load(result.output).healing.stopped == record.stopped
    healed = Path(result.output)
    assert changed(pruned, healed) and kl(healed, tiny_folder("llama")) < kl(pruned, tiny_folder("llama"))


def test_time_budget(pruned_folder, heal):
    notes = Notes()
    result = heal(pruned_folder(), budget="3s", progress=notes)
    assert result.record.steps >= 1 and any("fit into 3s" in note for note in notes.notes)
    assert result.record.curve[-1].step == result.record.steps


def test_progress_is_said_line_by_line(pruned_folder, heal):
    notes = Notes()
    heal(pruned_folder(), progress=notes)
    lines = [note for note in notes.notes if "held-out KL" in note]
    assert len(lines) == 4 and "tokens/s" in lines[-1] and "left" in lines[-1]


def test_healing_twice_keeps_the_first_record(pruned_folder, heal, tmp_path):
    first = heal(pruned_folder())
    second = heal(tmp_path / "healed", output=tmp_path / "twice")
    assert second.record.previous == first.record.to_dict()
    assert second.record.kl_before < first.record.kl_before
    assert PruneResult.load(tmp_path / "twice").healing == second.record


def test_shards_become_one_file(pruned_folder, heal, tmp_path):
    pruned = tmp_path / "sharded"
    shutil.copytree(pruned_folder(), pruned)
    model = load(pruned)
    for name in ("model.safetensors", LIST_FILE):
        (pruned / name).unlink()
    model.save_pretrained(pruned, max_shard_size="50KB")
    assert len(list(pruned.glob("*.safetensors"))) > 1
    heal(pruned)
    assert [path.name for path in (tmp_path / "healed").glob("*.safetensors*")] == ["model.safetensors"]
    assert not (tmp_path / "healed" / "model.safetensors.index.json").exists()
    assert forms(pruned) == forms(tmp_path / "healed")


def test_the_report_shows_the_curve(pruned_folder, heal):
    result = heal(pruned_folder())
    document = merge_results([str(pruned_folder()), result.output])
    plain, healed = document["cells"]
    assert plain["key"] != healed["key"] and healed["label"] == f"{plain['label']}, healed"
    assert [point["kl"] for point in healed["healing"]] == [point.kl for point in result.record.curve]
    assert "Held-out KL divergence" in render_report(document)
    assert "Held-out KL divergence" not in render_report(merge_results([str(pruned_folder())]))
