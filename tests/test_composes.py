"""A pruned checkpoint goes where any other model goes: hub, pipelines, fine-tuning, quantisers, lm-eval.

tests/runtime has the same for models of random shapes and other families; here it is what `prune` has published.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import intraslice

# Neither may the clean processes find the package, nor need the folder lie where it was written.
CLEAN_PROCESS = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "intraslice":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM, pipeline
found = {}
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(json.loads(sys.argv[1]))).logits
    generator = pipeline("text-generation", model=name, trust_remote_code=True)
    text = generator("The snow", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    found[name] = {"logits": logits.tolist(), "text": text, "module": type(model).__module__}
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def pruned(tiny_folder, tmp_path_factory) -> Path:
    """Return a checkpoint of three layers with different shapes: read only."""
    model = tiny_folder("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=128)
    output = tmp_path_factory.mktemp("composes") / "pruned"
    options = {
        "calibration.source": "builtin",
        "calibration.num_samples": 8,
        "calibration.seqlen": 64,
        "attention.head_multiple": 2,
        "ffn.ffn_multiple": 8,
    }
    intraslice.prune(str(model), output=output, sparsity=0.4, options=options)
    return output


@pytest.fixture
def model(pruned) -> Any:
    return AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32).eval()


def prompt(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(prompt()).logits


def as_hub_snapshot(folder: Path, cache: Path, name: str) -> str:
    """Lay a folder out as huggingface_hub does after a download: blobs, and a snapshot of links to them."""
    revision = "0" * 40
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    for path in (repository / "blobs", repository / "refs", snapshot):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for path in folder.iterdir():
        content = path.read_bytes()
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return name


def test_the_layers_differ(model):
    """Otherwise the tests below would say little."""
    assert len(set(model.config.layer_shapes)) > 1


def test_pipeline_by_path(pruned, model):
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    generator = pipeline("text-generation", model=str(pruned))
    assert type(generator.model).__module__ == "intraslice.runtime.modeling_intraslice"
    prompts = ["The snow", "A longer prompt that is"]
    for text, found in zip(prompts, generator(prompts, max_new_tokens=6, do_sample=False), strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0]
        assert found[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_hub_and_fine_tuning_without_the_package(pruned, model, tmp_path):
    """The checkpoint as a hub download, and a merged LoRA of it, in a process that lacks the package."""
    peft = pytest.importorskip("peft")
    expected = {"someone/pruned": logits_of(model)}
    as_hub_snapshot(pruned, tmp_path / "home" / "hub", "someone/pruned")

    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        loss = tuned(input_ids=prompt(), labels=prompt()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merged = tuned.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(pruned).save_pretrained(tmp_path / "merged")
    expected[str(tmp_path / "merged")] = logits_of(merged)
    assert not torch.allclose(*expected.values(), atol=1e-2)

    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "TRANSFORM"))
    }
    result = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN_PROCESS, json.dumps(prompt().tolist()), *expected],
        env={**environment, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    for name, logits in expected.items():
        assert found[name]["module"].startswith("transformers_modules.")
        torch.testing.assert_close(torch.tensor(found[name]["logits"]), logits, atol=1e-4, rtol=0)
        assert found[name]["text"].startswith("The snow")


def int8_of(library: str) -> Any:
    """Return a transformers config that quantises weights to 8 bits on the CPU."""
    import transformers

    if library == "quanto":
        pytest.importorskip("optimum.quanto")
        return transformers.QuantoConfig(weights="int8")
    if library == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize("library", ["quanto", "torchao", "bitsandbytes"])
def test_quantisers(library, pruned, model, tmp_path):
    config = int8_of(library)
    quantised = AutoModelForCausalLM.from_pretrained(
        pruned, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    layer, dense = quantised.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.q_proj
    assert (type(layer), type(layer.weight)) != (type(dense), type(dense.weight)), "nothing was quantised"
    expected, found = logits_of(model), logits_of(quantised).float()
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    text = quantised.generate(prompt(), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert text.shape == (2, 16)
    if library != "quanto":  # transformers does not save what quanto made.
        quantised.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
        torch.testing.assert_close(logits_of(again).float(), found, atol=1e-4, rtol=0)


def test_lm_eval_by_path(pruned, model, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    choices = ["white", "loud", "made of glass"]
    documents = [{"context": f"Number {i}: snow is", "choices": choices, "label": i % 3} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_choice.yaml").write_text(yaml.safe_dump(task))

    result = simple_evaluate(
        model=HFLM(pretrained=str(pruned), device="cpu", dtype="float32", batch_size=2),
        tasks=["tiny_choice"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    assert result is not None

    tokenizer = AutoTokenizer.from_pretrained(pruned)
    right = 0
    for sample in result["samples"]["tiny_choice"]:
        document = sample["doc"]
        expected = []
        for choice in choices:
            start = len(tokenizer(document["context"]).input_ids)
            ids = tokenizer(f"{document['context']} {choice}", return_tensors="pt").input_ids
            with torch.no_grad():
                scores = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            expected.append(scores.gather(1, ids[0, start:, None]).sum().item())
        assert [response[0] for response in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-3)
        right += expected.index(max(expected)) == document["label"]
    assert result["results"]["tiny_choice"]["acc,none"] == pytest.approx(right / len(documents))
