"""Files and words of strangers on the command line: one sentence each, before any work is done, and nothing is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from intraslice.checkpoint.tokenizer import open_tokenizer
from intraslice.cli.app import main
from intraslice.comparison.tables import write_outputs
from intraslice.data import encoding
from intraslice.errors import CheckpointError
from support.prune import prune
from support.refusal import Refused
from support.sample_comparison import sample
from support.task_rows import ROWS, write_tasks


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--align", "ffn=" + "9" * 60], "--align takes name=number pairs"),
        (["--align", "ffn=999999999"], "ffn.ffn_multiple must be in [1, 65536]"),
        (["--set", "ffn.damping=" + "[" * 3000], "the value of --set ffn.damping nests"),
        (["--set", "ffn.damping=2024-01-01"], "neither text, number"),
        (["--seed", str(2**64)], "calibration.seed must be in [0, 9223372036854775807]"),
        (["--num-samples", "9" * 5000], "num-samples"),
        (["--target-size", "1e999GB"], "target_size must be a number"),
        (["--set", "x" * 70_000], "an argument has 70000 characters"),
    ],
)
def test_options_that_nothing_can_have(options: list[str], sentence: str, tmp_path: Path, refused: Refused) -> None:
    budget = [] if "--target-size" in options else ["--sparsity", "0.3"]
    assert sentence in refused("prune", "model", "-o", tmp_path / "out", *budget, *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line", ["sparsity: 2024-01-01", "sparsity: !!binary aGk=", "model: !!set {a}", "output: [[[[", "? [a]\n: b"]
)
@pytest.mark.parametrize("command", ["prune", "compare"])
def test_recipes_hold_plain_data(command: str, line: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file.yaml").write_text(f"title: x\n{line}\n" if command == "compare" else f"{line}\n")
    words = ["--recipe", tmp_path / "file.yaml"] if command == "prune" else [tmp_path / "file.yaml"]
    assert "file.yaml" in refused(command, *words, "-o", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file.yaml"]


def test_an_output_in_the_home_of_nobody(tiny_folder, tmp_path: Path, refused: Refused, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.yaml").write_text(
        f"model: {tiny_folder('llama')}\nsparsity: 0.3\noutput: ~no-such-user-here/out\n"
    )
    assert "no home folder for '~no-such-user-here'" in refused("prune", "--recipe", "file.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["file.yaml"]


WRONG = (5, "x", None, [], {}, [1], {"x": 1}, True)


@pytest.fixture(scope="module")
def documents(tiny_folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small comparison document and a result.json."""
    root = tmp_path_factory.mktemp("results")
    document = sample(layers=2, methods=("intraslice",), sparsities=(0.3,))
    document["protocol"]["calibration"]["tokens"] = {}
    write_outputs(document, root)
    result = prune(tiny_folder("llama"), root / "out")
    recipe = {"model": "x", "method": "intraslice", "sparsity": 0.3, **result.recipe}
    return {
        "comparison.json": json.loads((root / "comparison.json").read_text()),
        "result.json": {**result.to_dict(), "recipe": recipe},
    }


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *(("comparison.json", (field,)) for field in ("title", "protocol", "cells", "analysis")),
        *(("comparison.json", ("cells", 1, field)) for field in ("key", "label", "method", "asked", "tasks", "speed")),
        *(("comparison.json", ("cells", 1, field)) for field in ("layers", "prune", "effective_rank", "perplexity")),
        ("comparison.json", ("cells", 1, "layers", 0)),
        ("comparison.json", ("protocol", "calibration")),
        ("comparison.json", ("analysis", "smollm2-135m", "rope_pairs")),
        *(("result.json", (field,)) for field in ("layers", "calibration", "recipe", "seconds", "sparsity", "method")),
        *(("result.json", ("layers", 0, field)) for field in ("shape", "errors", "heads", "num_parameters")),
        ("result.json", ("layers", 0, "shape", "heads_per_kv")),
    ],
)
def test_results_of_other_types(
    name: str, place: tuple[Any, ...], documents: dict[str, Any], tmp_path: Path, capfd
) -> None:
    refusals = 0
    for wrong in WRONG:
        content = json.loads(json.dumps(documents[name]))
        inner = content
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = wrong
        (tmp_path / name).write_text(json.dumps(content))
        status = main(["report", str(tmp_path / name), "-o", str(tmp_path / "page.html")])
        err = capfd.readouterr().err
        assert status in (0, 2) and err.count("\n") == (status == 2)
        refusals += status == 2
    assert refusals >= 4  # some of these types are right


_SPLIT = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
_WORDS = {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "<none>"}
BROKEN: dict[str, Callable[[dict[str, Any]], None]] = {
    "negative id": lambda data: data["model"]["vocab"].update(a=-1),
    "bad expression": lambda data: data.update(pre_tokenizer=_SPLIT),
    "unknown version": lambda data: data.update(version="9.9"),
    "no unknown token": lambda data: data.update(model=_WORDS, added_tokens=[]),
    "other model": lambda data: data.update(model={"type": "Nonsense"}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_tokenizers_that_the_library_refuses(case: str, make_folder, refused: Refused) -> None:
    folder = make_folder("llama")
    data = json.loads((folder / "tokenizer.json").read_text())
    BROKEN[case](data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    text = folder / "text.txt"
    text.write_text("Some words. " * 50)
    assert "tokenizer" in refused("eval", folder, "--text", text, "--seqlen", "16")
    options = ["--calibration", text, "--seqlen", "16", "--sparsity", "0.3", "-o", folder.parent / "out"]
    assert "tokenizer" in refused("prune", folder, *options)
    assert not list(folder.parent.glob("out*"))


def split_by(folder: Path, expression: str) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {**_SPLIT, "pattern": {"Regex": expression}}
    (folder / "tokenizer.json").write_text(json.dumps(data))


def test_an_expression_that_explodes(make_folder, refused: Refused) -> None:
    """The library gives up by itself and says so by a panic, which writes lines of its own."""
    folder = make_folder("llama")
    split_by(folder, "(a+)+$")
    text = folder / "text.txt"
    text.write_text("a" * 40 + "b" * 1000)
    assert "the tokenizer cannot take this text" in refused("eval", folder, "--text", text, "--seqlen", "16")


def test_an_expression_that_takes_too_long(make_folder, refused: Refused, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(encoding, "_MIN_CHARS_PER_SECOND", 1e9)
    folder = make_folder("llama")
    # The square of the length of the text: half a second here, hours for a text of ordinary length.
    split_by(folder, r"[^\n]*(?<=\x00)")
    text = folder / "text.txt"
    text.write_text("a" * 10_000)
    assert "the tokenizer with this text takes more than" in refused("eval", folder, "--text", text, "--seqlen", "16")


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('no') }}", "cannot be used: no"),
        ("{% if %}", "cannot be used: "),
        ("{{ ''.__class__.__mro__ }}", "cannot be used: "),
        (
            "{% for a in range(2000) %}{% for b in range(2000) %}{% endfor %}{% endfor %}",
            "takes more than 0.05 seconds",
        ),
    ],
)
def test_chat_templates(template: str, sentence: str, make_folder, refused: Refused, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "MAX_SECONDS", 0.05)
    folder = make_folder("llama")
    (folder / "chat_template.jinja").write_text(template)
    options = ["--calibration", "self-chat", "--num-samples", "2", "--seqlen", "16", "--sparsity", "0.3"]
    line = refused("prune", folder, *options, "-o", folder.parent / "out")
    assert "the chat template of the tokenizer" in line and sentence in line
    assert not list(folder.parent.glob("out*"))


@pytest.mark.parametrize("content", ["-0.0", '{"eos_token_id": 999999}', '{"eos_token_id": [["x"]]}'])
def test_generation_configs(content: str, make_folder, capfd) -> None:
    """They are read when a text is sampled; most of what they say is not used."""
    folder = make_folder("llama")
    (folder / "generation_config.json").write_text(content)
    options = ["--calibration", "self", "--num-samples", "2", "--seqlen", "16", "--sparsity", "0.3"]
    status = main(["prune", str(folder), *options, "-o", str(folder.parent / "out")])
    line = capfd.readouterr().err.splitlines()[-1]
    assert status == 0 or (status == 2 and line.startswith("error: no text can be sampled from"))


@pytest.mark.parametrize("command", ["inspect", "bench"])
def test_a_weight_index_with_a_name_that_no_file_can_have(command: str, make_folder, refused: Refused) -> None:
    folder = make_folder("llama")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "é" * 300}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    line = refused(command, folder)
    assert "too long" in line and "died" not in line


def test_a_tokenizer_of_another_model_writes_no_text_of_its_own(make_folder, refused: Refused) -> None:
    folder = make_folder("llama")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"] = {token: 1000 + number for token, number in data["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    options = ["--calibration", "self", "--num-samples", "2", "--seqlen", "16", "--sparsity", "0.3"]
    assert "is outside the vocabulary of 272" in refused("prune", folder, *options, "-o", folder.parent / "out")


def test_a_tokenizer_whose_length_is_no_number(make_folder) -> None:
    folder = make_folder("llama")
    data = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**data, "model_max_length": "many"}))
    with pytest.raises(CheckpointError, match="the tokenizer of 'x' .* model_max_length is 'many'"):
        open_tokenizer(folder, "x", None)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": "\\ud800"}', '{"text": ' + "9" * 9000 + "}", '{"text": 1}'])
def test_lines_of_text(line: str, tiny_folder, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "text.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    assert "line 2 of" in refused("eval", tiny_folder("llama"), "--text", tmp_path / "text.jsonl", "--seqlen", "16")


def test_lines_of_a_task(tiny_folder, tmp_path: Path, refused: Refused) -> None:
    folder = write_tasks(tmp_path / "tasks", {"piqa": ROWS["piqa"]})
    (folder / "piqa.jsonl").write_text('{"a":' * 10_000 + "1" + "}" * 10_000)
    line = refused("eval", tiny_folder("llama"), "--tasks", "piqa", "--task-data", folder)
    assert "line 1 of" in line and "deeper than" in line


@pytest.mark.parametrize("method", ["intraslice", "svd-llm", "slicegpt", "slimllm"])
def test_a_weight_beyond_all_others(method: str, make_folder, tmp_path: Path, refused: Refused) -> None:
    folder = make_folder("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = 1e19
    tensors["model.layers.1.self_attn.o_proj.weight"] = torch.full((32, 32), 1e25)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text("Some words, and some more words. " * 30)
    options = ["--calibration", text, "--seqlen", "16", "--num-samples", "2", "--method", method]
    sparsity = "0.2889" if method == "slicegpt" else "0.3"
    line = refused("prune", folder, *options, "--sparsity", sparsity, "-o", tmp_path / "out")
    assert "NaN or infinite" in line or "cannot be decomposed" in line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (("eval", "--text", "builtin@" + "9" * 100), "is unknown"),
        (("bench", "--kv-lengths", "9" * 5000), "--kv-lengths takes whole numbers"),
        (("prune", "-o", "out", "--sparsity", "0.3", "--heal", "9" * 400), "is neither tokens nor a time"),
        (("prune", "-o", "out", "--sparsity", "0.3", "--calibration", "a:1e400,b:1"), "weights are above 0"),
    ],
)
def test_numbers_beyond_all_use(command: tuple[str, ...], sentence: str, tiny_folder, refused: Refused) -> None:
    assert sentence in refused(*command, tiny_folder("llama"))


def test_names_are_no_markup(make_folder, tmp_path: Path, capsys) -> None:
    folder = make_folder("llama").rename(tmp_path / "[")
    (folder / "x]").mkdir()
    for file in [path for path in folder.iterdir() if path.is_file()]:
        file.rename(folder / "x]" / file.name)
    # As a path, "[/x]" closes a markup that nobody has opened.
    assert main(["inspect", str(folder / "x]")]) == 0
    assert "[/x]" in capsys.readouterr().out.replace("\n", "")


def test_words_of_a_stranger_do_not_rewrite_the_screen(make_folder, refused: Refused) -> None:
    folder = make_folder("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "\x1b[2J" + "x" * 5000}))
    assert "\x1b" not in refused("inspect", folder)
