from __future__ import annotations

import builtins
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from intraslice import api
from intraslice.errors import CalibrationError, MissingExtraError, NumericalError, RecipeError, TaskError
from intraslice.evaluation import harness
from intraslice.evaluation.task_data import FIELDS
from intraslice.evaluation.tasks import evaluate_tasks, open_tasks
from tiny import VOCAB_SIZE, tiny_model

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tasks"


def choices(*texts: str) -> dict[str, list[str]]:
    return {"text": list(texts), "label": [*"ABCDE"][: len(texts)]}


def arc(question: str, key: str, *texts: str) -> dict[str, Any]:
    return {"id": f"x {question}", "question": question, "choices": choices(*texts), "answerKey": key}


ARC = [
    arc("What falls from clouds?", "B", "Sand", "Rain", "Glass"),
    arc("What do bees make?", "A", "Honey", "Bread", "Iron", "Paper", "Salt"),
    arc("Which one is cold?", "C", "Fire", "Steam", "Ice", "Lava"),
]
# Own sentences under the hub's field names, fields that no definition uses among them.
ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": ARC,
    "arc_challenge": ARC[::-1],
    "piqa": [
        {"goal": "Dry a wet shirt", "sol1": "Hang it in the sun.", "sol2": "Put it into a lake.", "label": 0},
        {"goal": "Cut bread", "sol1": "Use a spoon.", "sol2": "Use a knife with teeth.", "label": 1},
    ],
    "winogrande": [
        {"sentence": "The cup fell off the shelf as the _ was tilted.", "option1": "cup", "option2": "shelf"},
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve"},
    ],
    "openbookqa": [
        {"id": "7", "question_stem": "A plant needs", "choices": choices("light", "a hat"), "answerKey": "A"},
        {"id": "8", "question_stem": "Frogs live", "choices": choices("in ponds", "in fire"), "answerKey": "A"},
    ],
    "boolq": [
        {"passage": "Cork floats on water.", "question": "does cork float", "idx": 4, "label": 1},
        {"passage": "Lead is a heavy metal.", "question": "is lead light", "idx": 5, "label": 0},
    ],
    "hellaswag": [
        {
            "ind": 24,
            "activity_label": "Baking",
            "ctx_a": "A man mixes flour.",
            "ctx_b": "then he",
            "endings": ["adds  water [title] and stirs.", "flies [step] off.", "sleeps."],
            "label": "0",
        },
        {"activity_label": "Sport", "ctx_a": "A ball rolls.", "ctx_b": "", "endings": ["It", "He sings"], "label": "1"},
    ],
}
for row, answer in zip(ROWS["winogrande"], ("2", "2"), strict=True):
    row["answer"] = answer
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


def write_tasks(folder: Path, rows: dict[str, list[dict[str, Any]]] = ROWS) -> Path:
    folder.mkdir(exist_ok=True)
    for task, examples in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    return folder


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


def test_the_fingerprint_is_that_of_the_files(data: Path, tmp_path: Path):
    both = open_tasks(["piqa", "boolq"], data).data
    assert open_tasks(["boolq", "piqa"], data).data == both
    assert open_tasks(["piqa"], data).data != both
    assert open_tasks(["piqa", "boolq"], write_tasks(tmp_path / "copy")).data == both
    with open(data / "boolq.jsonl", "a") as file:
        file.write("\n")
    assert open_tasks(["piqa", "boolq"], data).data != both


def test_nothing_of_lm_eval_is_shown(data: Path, tokenizer, capfd: pytest.CaptureFixture[str]):
    evaluate_tasks(tiny_model("llama"), tokenizer, NAMES, task_data=data)
    assert capfd.readouterr() == ("", "")
    # And its own bar is back afterwards.
    assert harness.lm_eval.api.task.tqdm.__name__ == "tqdm"


def edited(data: Path, task: str, change: Callable[[list[str]], list[str]]) -> list[str]:
    path = data / f"{task}.jsonl"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    return [task]


def without(field: str) -> Callable[[list[str]], list[str]]:
    def change(lines: list[str]) -> list[str]:
        last = {key: value for key, value in json.loads(lines[-1]).items() if key != field}
        return [*lines[:-1], json.dumps(last)]

    return change


def with_value(field: str, value: Any) -> Callable[[list[str]], list[str]]:
    return lambda lines: [json.dumps({**json.loads(lines[0]), field: value}), *lines[1:]]


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("piqa", without("sol2"), r"line 2 of '.*piqa.jsonl' has no field 'sol2'; piqa needs goal, sol1, sol2, label"),
        ("piqa", lambda lines: [lines[0], "{"], r"line 2 of '.*piqa.jsonl' is not JSON"),
        ("piqa", lambda lines: ["[1]"], r"line 1 of '.*piqa.jsonl' is not a JSON object"),
        ("piqa", lambda lines: ["", " "], r"piqa.jsonl' holds no examples"),
        ("piqa", with_value("label", -1), r"line 1 of .*'label' has to be one of 0, 1, not -1"),
        ("boolq", with_value("label", True), r"'label' has to be one of 0, 1, not true"),
        ("piqa", with_value("sol1", ""), r"'sol1' has to be a text that is not empty"),
        ("winogrande", with_value("answer", 1), r"'answer' has to be one of '1', '2', not 1"),
        ("winogrande", with_value("sentence", "no gap"), r"'sentence' has to be a text with the blank '_'"),
        ("arc_easy", with_value("answerKey", "E"), r"'answerKey' has to be one of choices.label"),
        ("arc_easy", with_value("choices", {"text": ["a"], "label": ["A", "B"]}), r"'choices' has to be"),
        ("openbookqa", with_value("choices", ["a"]), r"'choices' has to be"),
        ("hellaswag", with_value("label", 0), r"'label' has to be the number of an ending, as a text, not 0"),
        ("hellaswag", with_value("endings", "a"), r"'endings' has to be a list of texts"),
    ],
)
def test_wrong_lines(data: Path, task: str, change: Any, message: str):
    with pytest.raises(TaskError, match=message):
        open_tasks(edited(data, task, change), data)


def test_not_utf8(data: Path):
    (data / "piqa.jsonl").write_bytes(b'{"goal": "\xff"}')
    with pytest.raises(TaskError, match="not UTF-8"):
        open_tasks(["piqa"], data)


def test_missing_files(data: Path):
    (data / "piqa.jsonl").unlink()
    with pytest.raises(TaskError, match=r"has no file piqa.jsonl; it has data for arc_challenge, arc_easy, boolq"):
        open_tasks(["boolq", "piqa"], data)
    with pytest.raises(TaskError, match="no folder of task data"):
        open_tasks(["piqa"], data / "none")
    with pytest.raises(TaskError, match=r"no local form of task 'arc_esy'.*Did you mean 'arc_easy'\?"):
        open_tasks(["arc_esy"], data)


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


def test_api_refuses_before_the_model_is_loaded(data: Path, tmp_path: Path):
    with pytest.raises(TaskError, match="no local form"):
        api.evaluate_tasks(tmp_path / "no model", ["pica"], task_data=data)
    with pytest.raises(RecipeError, match="limit"):
        api.evaluate_tasks(tmp_path / "no model", ["piqa"], limit=-1)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data of the five tasks in ../shared")
def test_the_whole_data_of_five_tasks():
    sizes = {"arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500, "piqa": 1838, "winogrande": 1267}
    opened = open_tasks(list(sizes), SHARED)
    assert {name: len(task.eval_docs) for name, task in opened.tasks.items()} == sizes
    assert set(sizes) < set(FIELDS)
