from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from intraslice.data import text as text_module
from intraslice.data.calibration import Calibration, load_calibration
from intraslice.data.text import load_text
from intraslice.errors import CalibrationError, MissingExtraError, NumericalError
from support.tiny import BOS, VOCAB_SIZE, tiny_tokenizer

Folder = Callable[..., Path]
# 100 lines of 10 characters, no two the same.
LINES = [f"line {number:04d}" for number in range(100)]


def calibrate(source: str | Path, tokenizer: Any, **changes: Any) -> Calibration:
    options: dict[str, Any] = {
        "num_samples": 4,
        "seqlen": 16,
        "seed": 0,
        "vocab_size": VOCAB_SIZE,
        "model_folder": Path("/nowhere"),
        "device": "cpu",
    }
    return load_calibration(str(source), tokenizer, **{**options, **changes})


def one_sentence(caught: pytest.ExceptionInfo[Exception], *words: str) -> None:
    message = str(caught.value)
    assert "\n" not in message and len(message) < 450
    for word in words:
        assert word in message


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES))
    return path


# From a text to tokens.


def test_blocks_of_one_stream_none_twice(tokenizer: Any, text_file: Path) -> None:
    stream = tokenizer(text_file.read_text())["input_ids"]
    num_blocks = len(stream) // 16
    calibration = calibrate(text_file, tokenizer, num_samples=num_blocks)
    blocks = {tuple(stream[16 * index : 16 * (index + 1)]) for index in range(num_blocks)}
    assert calibration.tokens.dtype == torch.int64
    assert calibration.tokens.shape == (num_blocks, 16)
    assert {tuple(row) for row in calibration.tokens.tolist()} == blocks
    assert (calibration.source, calibration.seed) == (str(text_file), 0)


def test_the_seed_decides_the_choice(tokenizer: Any, text_file: Path) -> None:
    first, again = calibrate(text_file, tokenizer), calibrate(text_file, tokenizer)
    other = calibrate(text_file, tokenizer, seed=1)
    assert torch.equal(first.tokens, again.tokens)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_too_short_says_what_there_is_and_what_is_needed(tokenizer: Any, text_file: Path) -> None:
    num_tokens = len(tokenizer(text_file.read_text())["input_ids"])
    with pytest.raises(CalibrationError) as caught:
        calibrate(text_file, tokenizer, num_samples=100, seqlen=32)
    one_sentence(caught, f"{num_tokens} tokens", "100 sequences", "3200 tokens")


@pytest.mark.parametrize("content", ["", " \n\n\t"])
def test_empty_text(tokenizer: Any, tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(CalibrationError) as caught:
        calibrate(path, tokenizer)
    one_sentence(caught, "is empty")


def test_token_ids_outside_the_vocabulary(tokenizer: Any, text_file: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrate(text_file, tokenizer, vocab_size=20)
    one_sentence(caught, "outside the model's vocabulary of 20", "do not belong together")


@pytest.mark.parametrize("changes", [{"num_samples": 0}, {"seqlen": 1}, {"num_samples": -3}])
def test_nothing_to_calibrate_with(tokenizer: Any, text_file: Path, changes: dict[str, int]) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrate(text_file, tokenizer, **changes)
    one_sentence(caught, "cannot calibrate")


# Names and files.


def test_unknown_name_suggests_the_nearest(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrate("wikitext-2", tokenizer)
    one_sentence(caught, "builtin", "alpaca", "Did you mean 'wikitext2'?")


@pytest.mark.parametrize("name", ["missing.txt", "no/such/file", "/nowhere/x.parquet"])
def test_missing_file(tokenizer: Any, name: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrate(name, tokenizer)
    one_sentence(caught, "there is no text file", name)


def test_a_folder_or_another_type_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="is a folder"):
        calibrate(tmp_path, tokenizer)
    path = tmp_path / "notes.docx"
    path.write_bytes(b"")
    with pytest.raises(CalibrationError, match="not of a known type"):
        calibrate(path, tokenizer)


def test_text_that_is_not_utf8(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"caf\xe9 " * 50)
    with pytest.raises(CalibrationError) as caught:
        calibrate(path, tokenizer)
    one_sentence(caught, "not UTF-8", "byte 3")


def test_a_very_long_text_is_cut_and_says_so(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "MAX_CHARS", 25)
    notes: list[str] = []
    progress: Any = SimpleNamespace(note=notes.append)
    assert load_text(str(text_file), progress=progress) == text_file.read_text()[:25]
    assert "25 characters" in notes[0]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS = pytest.mark.parametrize(
    ("name", "write"), [("t.jsonl", write_jsonl), ("t.parquet", write_parquet)], ids=["jsonl", "parquet"]
)


@WRITERS
@pytest.mark.parametrize(
    ("row", "text_field"),
    [
        ({"text": "yes", "title": "no"}, None),
        ({"question": "yes", "score": 3}, None),
        ({"text": "no", "title": "yes"}, "title"),
    ],
    ids=["text", "only-strings", "named"],
)
def test_column_of_a_table(
    tmp_path: Path, name: str, write: Callable[..., Path], row: dict[str, Any], text_field: str | None
) -> None:
    path = write(tmp_path / name, [row, row])
    assert load_text(str(path), text_field=text_field) == "yes\n\nyes"


@WRITERS
def test_ambiguous_and_missing_columns(tmp_path: Path, name: str, write: Callable[..., Path]) -> None:
    path = write(tmp_path / name, [{"question": "a", "answer": "b"}])
    with pytest.raises(CalibrationError) as caught:
        load_text(str(path))
    one_sentence(caught, "question, answer", "text_field")
    with pytest.raises(CalibrationError) as caught:
        load_text(str(path), text_field="body")
    one_sentence(caught, "body", "question, answer")


@pytest.mark.parametrize(
    ("line", "words"), [("{'a': 1}", "is not JSON"), ("[1]", "not a JSON object"), ('{"text": 3}', "no text")]
)
def test_broken_json_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CalibrationError) as caught:
        load_text(str(path))
    one_sentence(caught, "line 2", words)


def test_broken_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "t.parquet"
    path.write_bytes(b"not a parquet file at all")
    with pytest.raises(CalibrationError) as caught:
        load_text(str(path))
    one_sentence(caught, "not a parquet file")


# The built-in text.


def test_built_in_text_grows_only_as_far_as_needed(tokenizer: Any) -> None:
    short = load_text("builtin")
    assert "assert" in short and len(short) > 300_000
    longer = load_text("builtin", min_chars=len(short) + 20_000)
    assert longer.startswith(short)
    assert len(short) + 20_000 <= len(longer) < len(short) + 100_000
    assert calibrate("builtin", tokenizer, num_samples=64, seqlen=128).tokens.shape == (64, 128)


# Data sets of the hub, through a stand-in for the package.


class FakeDatasetsError(Exception):
    pass


@pytest.fixture
def fake_datasets(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return what the stand-in was asked for; its `answer` is the rows, or an exception to raise."""
    state = SimpleNamespace(calls=[], answer=[])
    module, exceptions = ModuleType("datasets"), ModuleType("datasets.exceptions")

    def load_dataset(path: str, config: str | None = None, **options: Any) -> list[dict[str, str]]:
        state.calls.append((path, config, options))
        if isinstance(state.answer, Exception):
            raise state.answer
        return state.answer

    vars(exceptions)["DatasetsError"] = FakeDatasetsError
    vars(module).update(load_dataset=load_dataset, exceptions=exceptions)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", exceptions)
    return state


@pytest.mark.parametrize(
    ("name", "path", "column", "joined", "test_split"),
    [
        ("wikitext2", "Salesforce/wikitext", "text", "a\n\nb", "test"),
        ("c4", "allenai/c4", "text", "a b", "validation"),
        ("ptb", "ptb-text-only/ptb_text_only", "sentence", "a b", "test"),
        ("alpaca", "tatsu-lab/alpaca", "text", "a\n\nb", "train"),
    ],
)
def test_data_set(
    fake_datasets: SimpleNamespace, name: str, path: str, column: str, joined: str, test_split: str
) -> None:
    fake_datasets.answer = [{column: "a"}, {column: "b"}]
    assert load_text(name) == joined
    assert load_text(name, split="test") == joined
    assert [call[0] for call in fake_datasets.calls] == [path, path]
    assert [call[2]["split"] for call in fake_datasets.calls] == ["train", test_split]
    for _, _, options in fake_datasets.calls:
        assert set(options.get("data_files", {options["split"]: ""})) == {options["split"]}


def test_large_data_sets_are_read_as_far_as_needed(fake_datasets: SimpleNamespace) -> None:
    read: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for number in range(100):
            read.append(number)
            yield {"text": "ten chars."}

    fake_datasets.answer = rows()
    assert load_text("fineweb-edu", min_chars=25) == "\n\n".join(["ten chars."] * 3)
    assert read == [0, 1, 2]
    ((path, config, options),) = fake_datasets.calls
    assert (path, config) == ("HuggingFaceFW/fineweb-edu", "sample-10BT") and options["streaming"] is True


def test_conversations_go_through_the_chat_template(fake_datasets: SimpleNamespace, tokenizer: Any) -> None:
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    fake_datasets.answer = [{"messages": said}] * 2
    plain = "user: Hello\nassistant: Hi"
    assert load_text("ultrachat", tokenizer=tokenizer) == f"{plain}\n\n{plain}"
    chat = tiny_tokenizer()
    chat.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    assert load_text("ultrachat", tokenizer=chat) == "[user]Hello[assistant]Hi\n\n[user]Hello[assistant]Hi"
    assert fake_datasets.calls[0][2]["split"] == "train_sft"


def test_the_mixture_of_the_hub(tokenizer: Any, fake_datasets: SimpleNamespace) -> None:
    fake_datasets.answer = [
        {
            "text": "words of the web. " * 20,
            "content": "def f(): pass\n" * 20,
            "messages": [{"role": "user", "content": "Hi"}] * 40,
        }
    ] * 20
    mixed = calibrate("hub-mix", tokenizer, num_samples=10)
    assert mixed.source == "hub-mix"
    assert mixed.parts == {"fineweb-edu": 4, "ultrachat": 2, "codeparrot": 2, "finemath": 2}


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no\nnetwork"),
        ValueError("nothing cached"),
        RuntimeError("scripts are no longer supported"),
        FakeDatasetsError("gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_data_set_out_of_reach(tokenizer: Any, fake_datasets: SimpleNamespace, error: Exception) -> None:
    fake_datasets.answer = error
    with pytest.raises(CalibrationError) as caught:
        calibrate("wikitext2", tokenizer)
    one_sentence(caught, "wikitext2", "Salesforce/wikitext", "builtin")


def test_the_real_package_offline(tokenizer: Any) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(CalibrationError) as caught:
        calibrate("ptb", tokenizer)
    one_sentence(caught, "ptb", "cannot be loaded")


@pytest.mark.parametrize(("missing", "source"), [("datasets", "c4"), ("pyarrow", "t.parquet")])
def test_missing_package_names_the_extra(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, source: str
) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    real_import = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError) as caught:
        calibrate(source, tokenizer)
    one_sentence(caught, "intraslice[data]")


# Sampled from the model itself.


@pytest.mark.parametrize("source", ["self", "self-start"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_self_sampling_is_seeded(tiny_folder: Folder, tokenizer: Any, family: str, source: str) -> None:
    folder = tiny_folder(family)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = calibrate(source, tokenizer, model_folder=folder)
    again = calibrate(source, tokenizer, model_folder=folder)
    other = calibrate(source, tokenizer, model_folder=folder, seed=1)
    assert first.tokens.shape == (4, 16) and first.tokens.dtype == torch.int64
    assert (first.tokens[:, 0] == BOS).all() == (source == "self-start")
    assert torch.equal(first.tokens, again.tokens)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len({tuple(row) for row in first.tokens.tolist()}) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_self_sampling_follows_the_distribution_of_the_model(tiny_folder: Folder, tokenizer: Any) -> None:
    folder = tiny_folder("llama")
    tokens = calibrate("self-start", tokenizer, model_folder=folder, num_samples=4000, seqlen=2).tokens
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[BOS]])).logits[0, 0]
    expected = logits.double().softmax(-1)
    seen = torch.bincount(tokens[:, 1], minlength=VOCAB_SIZE) / 4000
    # Half the summed deviation of 4000 draws from 272 outcomes is about sqrt(272 / (2 pi 4000)) = 0.1.
    assert (seen - expected).abs().sum() / 2 < 0.15


def test_self_sampling_in_small_batches(tiny_folder: Folder, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intraslice.data.sampling._CACHE_BYTES", 1)
    assert calibrate("self", tokenizer, model_folder=tiny_folder("llama")).tokens.shape == (4, 16)


def test_self_sampling_without_bos_starts_with_plain_tokens(tiny_folder: Folder) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    tokens = calibrate("self-start", tokenizer, model_folder=tiny_folder("llama"), num_samples=32, seqlen=2).tokens
    assert not set(tokens[:, 0].tolist()) & set(tokenizer.all_special_ids)
    assert len(set(tokens[:, 0].tolist())) > 16


def test_self_sampling_from_a_broken_model(make_folder: Folder, tokenizer: Any) -> None:
    folder = make_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(NumericalError) as caught:
        calibrate("self", tokenizer, model_folder=folder)
    one_sentence(caught, "NaN")


def test_self_is_no_text_to_evaluate_on() -> None:
    with pytest.raises(CalibrationError, match="sampled from a model"):
        load_text("self")
