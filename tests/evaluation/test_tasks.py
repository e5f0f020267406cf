from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from intraslice import api
from intraslice.errors import CalibrationError, MissingExtraError, NumericalError, RecipeError, TaskError
from intraslice.evaluation import harness
from intraslice.evaluation.tasks import evaluate_tasks, open_tasks
from support.task_rows import ROWS, write_tasks
from support.tiny import VOCAB_SIZE, tiny_model
from support.tiny_models import pruned_model

NAMES = tuple(ROWS)
HUB_FILES = {
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "piqa": ("baber/piqa", None, "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
    "boolq": ("aps/super_glue", "boolq", "validation"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "data")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve the examples under the hub's names; every other split holds something else."""

    def load_dataset(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        task, split = next((task, place[2]) for task, place in HUB_FILES.items() if place[:2] == (path, name))
        other = [row for row in reversed(ROWS[task])]
        splits = {key: datasets.Dataset.from_list(other) for key in ("train", "validation", "test")}
        return datasets.DatasetDict({**splits, split: datasets.Dataset.from_list(ROWS[task])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def prompts(task: Any) -> list[tuple[str, str]]:
    task.build_all_requests()
    return [request.args for request in task.instances]


def gold(task: Any) -> list[Any]:
    return [task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc) for doc in task.eval_docs]


@pytest.mark.parametrize("name", NAMES)
def test_local_files_give_the_prompts_of_the_official_definition(name: str, data: Path, hub: None):
    from lm_eval.tasks import TaskManager

    folder = Path(str(harness.lm_eval.tasks.__file__)).parent
    official = TaskManager(include_path=[folder / f for f in harness._FOLDERS], include_defaults=False)
    expected = official.load([name])["tasks"][name]
    task = open_tasks([name], data).tasks[name]
    assert prompts(task) == prompts(expected)
    assert gold(task) == gold(expected)
    assert list(task.aggregation()) == list(expected.aggregation())
    assert [task.doc_to_choice(doc) for doc in task.eval_docs] == [
        expected.doc_to_choice(doc) for doc in expected.eval_docs
    ]


def test_the_prompts_are_those_of_the_papers_harness(data: Path):
    opened = open_tasks(NAMES, data).tasks
    assert prompts(opened["arc_easy"])[1] == ("Question: What falls from clouds?\nAnswer:", " Rain")
    assert prompts(opened["winogrande"])[:2] == [
        ("The cup fell off the shelf as the cup", " was tilted."),
        ("The cup fell off the shelf as the shelf", " was tilted."),
    ]
    assert prompts(opened["boolq"])[0] == ("Cork floats on water.\nQuestion: does cork float?\nAnswer:", " no")
    # process_docs of hellaswag: the label first, brackets and double spaces gone.
    assert prompts(opened["hellaswag"])[0] == ("Baking: A man mixes flour. Then he", " adds water. and stirs.")
    assert gold(opened["winogrande"]) == [1, 1] and gold(opened["hellaswag"]) == [0, 1]


def plain_lm_eval(model: Any, tokenizer: Any) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = Path(str(harness.lm_eval.tasks.__file__)).parent
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=list(NAMES),
        task_manager=TaskManager(include_path=[folder / f for f in harness._FOLDERS], include_defaults=False),
    )
    assert found is not None
    return found["results"]


def test_equal_to_lm_eval_alone(data: Path, hub: None, tokenizer, monkeypatch: pytest.MonkeyPatch):
    import lm_eval.evaluator

    # Seconds of asking the system for its versions.
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)
    model = tiny_model("llama")
    expected = plain_lm_eval(model, tokenizer)
    results = evaluate_tasks(model, tokenizer, NAMES, task_data=data, batch_size=2)
    assert tuple(results.tasks) == NAMES
    for name, score in results.tasks.items():
        wanted = expected[name]
        assert score.samples == len(ROWS[name])
        assert score.acc == wanted["acc,none"]
        assert score.acc_stderr == pytest.approx(wanted["acc_stderr,none"])
        assert score.acc_norm == wanted.get("acc_norm,none")
        assert score.acc_norm_stderr == pytest.approx(wanted.get("acc_norm_stderr,none"))
    with_norm = {name for name, score in results.tasks.items() if score.acc_norm is not None}
    # The tables of the paper name acc for winogrande and boolq, acc_norm for the others.
    assert with_norm == {"arc_easy", "arc_challenge", "piqa", "openbookqa", "hellaswag"}
    reported = [s.acc_norm if name in with_norm else s.acc for name, s in results.tasks.items()]
    assert results.average == pytest.approx(sum(r for r in reported if r is not None) / 7)
    from_hub = evaluate_tasks(model, tokenizer, NAMES, batch_size=5)
    assert from_hub.tasks == results.tasks and from_hub.data == "hub"


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_log_likelihoods_equal_those_of_lm_eval(family: str, data: Path, tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Long prompts are cut as lm-eval cuts them; an unknown architecture takes lm-eval's own path."""
    from lm_eval.models.huggingface import HFLM

    model = tiny_model("llama") if family == "llama" else granite()
    model.config.max_position_embeddings = 40
    task = open_tasks(["piqa"], data).tasks["piqa"]
    task.build_all_requests()
    expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(task.instances)
    counted: list[int] = []
    ours = harness._Harness(model, tokenizer, 2, Counter(counted)).loglikelihood(task.instances)
    # float32 sums in another order, over up to 24 tokens.
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert sum(counted) == len(expected) == 4


def granite() -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        logits_scaling=3.0,
    )
    return GraniteForCausalLM(config).eval()


class Counter:
    """Progress that keeps what it is told."""

    def __init__(self, counted: list[int]):
        self.counted = counted

    def step(self, description: str, total: int) -> Any:
        from contextlib import nullcontext

        return nullcontext(self.counted.append)

    def note(self, message: str) -> None:
        raise AssertionError(message)


def test_a_limit_takes_the_first_examples(data: Path, tokenizer):
    model = tiny_model("llama")
    first = evaluate_tasks(model, tokenizer, ["arc_easy"], task_data=data, limit=1)
    (score,) = first.tasks.values()
    assert (score.samples, score.acc_stderr, first.limit) == (1, None, 1)
    (again,) = evaluate_tasks(model, tokenizer, ["arc_easy"], task_data=data, limit=99).tasks.values()
    assert again.samples == 3
    assert first.to_dict()["tasks"]["arc_easy"]["acc"] in (0.0, 1.0)


def test_nothing_of_lm_eval_is_shown(data: Path, tokenizer, capfd: pytest.CaptureFixture[str]):
    evaluate_tasks(tiny_model("llama"), tokenizer, NAMES, task_data=data)
    assert capfd.readouterr() == ("", "")
    # And its own bar is back afterwards.
    assert harness.lm_eval.api.task.tqdm.__name__ == "tqdm"


def test_wrong_names(monkeypatch: pytest.MonkeyPatch):
    from lm_eval.tasks import TaskManager

    folder = Path(str(harness.lm_eval.tasks.__file__)).parent / "arc"
    # The whole index takes many seconds to read.
    monkeypatch.setattr(harness, "_manager", lambda _: TaskManager(include_path=[folder], include_defaults=False))
    with pytest.raises(TaskError, match=r"'arc_esy' is unknown.*lm-eval ls subtasks.*Did you mean 'arc_easy'\?"):
        open_tasks(["arc_esy"])
    with pytest.raises(TaskError, match="'ai2_arc' is a group"):
        open_tasks(["ai2_arc"])
    with pytest.raises(TaskError, match="no task is named"):
        open_tasks([])


def test_a_task_without_accuracy(monkeypatch: pytest.MonkeyPatch):
    from lm_eval.tasks import TaskManager

    folder = Path(str(harness.lm_eval.tasks.__file__)).parent / "super_glue" / "boolq"
    rows = datasets.Dataset.from_list(ROWS["boolq"])
    monkeypatch.setattr(harness, "_manager", lambda _: TaskManager(include_path=[folder], include_defaults=False))
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.DatasetDict({"train": rows, "validation": rows}))
    with pytest.raises(TaskError, match=r"'boolq-seq2seq' is not scored by accuracy over given answers"):
        open_tasks(["boolq-seq2seq"])


def test_without_a_hub():
    # The tests run with the hub switched off.
    with pytest.raises(TaskError, match=r"'winogrande' cannot be loaded from the hub.*--task-data"):
        open_tasks(["winogrande"])


def test_without_lm_eval(data: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    real = builtins.__import__

    def no_lm_eval(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError("no lm_eval", name="lm_eval")
        return real(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "intraslice.evaluation.harness")
    monkeypatch.delattr("intraslice.evaluation.harness")
    monkeypatch.setattr(builtins, "__import__", no_lm_eval)
    with pytest.raises(MissingExtraError, match=re.escape('pip install "intraslice[eval]"')):
        open_tasks(["piqa"], data)


def test_wrong_numbers(data: Path, tokenizer):
    model = tiny_model("llama")
    with pytest.raises(RecipeError, match="limit must be at least 1, got 0"):
        evaluate_tasks(model, tokenizer, ["piqa"], task_data=data, limit=0)
    with pytest.raises(RecipeError, match="batch_size must be at least 1, got 0"):
        evaluate_tasks(model, tokenizer, ["piqa"], task_data=data, batch_size=0)


def test_models_that_cannot_be_scored(data: Path, tokenizer):
    def score(model: Any) -> Any:
        return evaluate_tasks(model, tokenizer, ["piqa"], task_data=data)

    with pytest.raises(CalibrationError, match="outside the vocabulary of 60"):
        score(tiny_model("llama", vocab_size=60, pad_token_id=None))
    with pytest.raises(TaskError, match=r"an answer of \d+ tokens is beyond the 16 positions"):
        score(tiny_model("llama", max_position_embeddings=16))
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        score(broken)


def test_a_saved_pruned_model(data: Path, tmp_path: Path, tokenizer):
    model = pruned_model("llama-gqa-biases", torch.float32, vocab_size=VOCAB_SIZE, max_position_embeddings=128)
    model.save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    names = ["hellaswag", "winogrande"]
    saved = api.evaluate_tasks(tmp_path / "pruned", names, task_data=data, batch_size=3)
    assert saved.tasks == evaluate_tasks(model, tokenizer, names, task_data=data, batch_size=3).tasks
    assert list(saved.tasks) == names


def test_api_refuses_before_the_model_is_loaded(data: Path, tmp_path: Path):
    with pytest.raises(TaskError, match="no local form"):
        api.evaluate_tasks(tmp_path / "no model", ["pica"], task_data=data)
    with pytest.raises(RecipeError, match="limit"):
        api.evaluate_tasks(tmp_path / "no model", ["piqa"], limit=-1)
