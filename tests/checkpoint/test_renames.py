"""Checkpoints whose tensors have other names than the state dict, composite ones, and pruned ones of other formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig

from intraslice import api
from intraslice.checkpoint.reader import open_folder
from intraslice.cli.app import main
from intraslice.data.calibration import load_calibration
from intraslice.errors import CalibrationError, CheckpointError
from intraslice.runtime import configuration_intraslice
from intraslice.runtime.families_intraslice import FAMILIES
from support.prune import prune, weights_of
from support.pruned import FREE, save_pruned
from support.tiny import make_tiny

Folder = Callable[..., Path]
RENAMES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("embed_out.", "lm_head."),
)
# What the layouts of composite models and of GPT-NeoX do to the names of Llama.
LAYOUTS = {
    "inner": {"model.": "model.language_model."},
    "outer": {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    "head": {"lm_head.": "embed_out."},
    "plain": {},
}


def rename(folder: Path, prefixes: dict[str, str]) -> Path:
    """Store the tensors of a saved model under other names."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for old, new in prefixes.items():
        tensors = {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in tensors.items()
        }
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def renames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], renames=RENAMES))


@pytest.fixture(scope="module")
def pruned_plain(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the pruned weights of the stock names through the row without renames."""
    assert not FAMILIES["llama"].renames
    output = tmp_path_factory.mktemp("plain") / "pruned"
    prune(tiny_folder("llama"), output)
    return weights_of(output)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_renamed_tensors_prune_to_the_same_weights(
    layout: str, pruned_plain: dict[str, torch.Tensor], renames: None, tmp_path: Path
) -> None:
    folder = rename(make_tiny("llama", tmp_path / "dense"), LAYOUTS[layout])
    prune(folder, tmp_path / "pruned")
    found = weights_of(tmp_path / "pruned")
    assert found.keys() == pruned_plain.keys()
    assert all(torch.equal(found[name], pruned_plain[name]) for name in found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_renamed_tensors_are_the_same_model(layout: str, tiny_folder: Folder, renames: None, tmp_path: Path) -> None:
    plain = open_folder(tiny_folder("llama"))
    renamed = open_folder(rename(make_tiny("llama", tmp_path), LAYOUTS[layout]))
    assert renamed.fingerprint() == plain.fingerprint()
    assert renamed.load_rest().keys() == plain.load_rest().keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_renamed_tensors_are_evaluated_as_the_same_model(
    layout: str, tiny_folder: Folder, renames: None, tmp_path: Path
) -> None:
    folder = rename(make_tiny("llama", tmp_path), LAYOUTS[layout])
    (tmp_path / "text.txt").write_text("one line of text\n" * 50)
    measured = [
        api.evaluate(model, text=str(tmp_path / "text.txt"), seqlen=16, device="cpu").perplexity
        for model in (tiny_folder("llama"), folder)
    ]
    assert measured[0] == measured[1]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_row_without_renames_refuses_other_names(family: str, make_folder: Folder, renames: None) -> None:
    folder = rename(make_folder(family), LAYOUTS["outer"])
    if family == "llama":
        open_folder(folder)
        return
    with pytest.raises(CheckpointError, match="lacks"):
        open_folder(folder)


def test_names_of_the_state_dict_are_never_renamed(make_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder("llama")
    before = open_folder(folder).fingerprint()
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], renames=(("model.", "decoder."),)))
    assert open_folder(folder).fingerprint() == before


def test_a_stored_copy_of_a_tied_head_may_have_another_name(make_folder: Folder, renames: None) -> None:
    folder = make_folder("llama", tie_word_embeddings=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "embed_out.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    assert open_folder(folder).load_rest().keys() == {"model.embed_tokens.weight", "model.norm.weight"}


def test_one_tensor_under_two_names_is_refused(make_folder: Folder, renames: None) -> None:
    path = make_folder("llama") / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "embed_out.weight": tensors["lm_head.weight"] + 1}, path)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' twice, as .*embed_out\.weight"):
        open_folder(path.parent)


def test_no_text_is_sampled_from_weights_that_transformers_does_not_find(make_folder: Folder, renames: None) -> None:
    folder = rename(make_folder("llama"), LAYOUTS["outer"])
    checkpoint = open_folder(folder)
    with pytest.raises(CalibrationError, match="no text can be sampled .* calibrate on a text instead"):
        load_calibration(
            "self",
            checkpoint.load_tokenizer(),
            num_samples=2,
            seqlen=4,
            seed=0,
            vocab_size=checkpoint.config.vocab_size,
            model_folder=folder,
            device="cpu",
        )


# Composite checkpoints (what is done with them: tests/runtime/test_composites.py).


def test_no_composite_is_a_family_itself() -> None:
    composites = [model_type for spec in FAMILIES.values() for model_type in spec.text_of]
    assert composites and not FAMILIES.keys() & set(composites)
    assert set(composites) <= set(CONFIG_MAPPING.keys())


# Formats of pruned checkpoints.


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must refuse its input, and return its only line on standard error."""
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    # An empty line ends a progress bar.
    lines = [line for line in printed.err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert "Traceback" not in printed.out + printed.err
    return lines[0]


def with_format(folder: Path, version: Any, **changes: Any) -> Path:
    """Write another number, and other entries beside it, into a saved pruned model."""
    save_pruned(folder, shapes=FREE[:2])
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["intraslice"].update(format_version=version, **changes)
    path.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("command", ["inspect", "eval", "export", "bench"])
def test_a_newer_format_is_refused_in_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = configuration_intraslice.FORMAT_VERSION
    # Layers of a form that this release cannot read either.
    folder = with_format(tmp_path / "newer", newest + 41, layers=["?"])
    (tmp_path / "text.txt").write_text("one line of text\n" * 50)
    options = {
        "inspect": [],
        "eval": ["--text", str(tmp_path / "text.txt"), "--seqlen", "16"],
        "export": ["--to", "padded", "--output", str(tmp_path / "out")],
        "bench": [],
    }
    line = refusal([command, str(folder), *options[command]], capsys)
    sentence = (
        f"format version {newest + 41} of this checkpoint is newer than version {newest}, the newest that this code "
        "reads; install a newer release of intraslice."
    )
    assert line.endswith(sentence)
    assert "validat" not in line and "Error" not in line


def test_an_older_format_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_format(tmp_path / "older", configuration_intraslice.FORMAT_VERSION)
    monkeypatch.setattr(configuration_intraslice, "FORMAT_VERSION", configuration_intraslice.FORMAT_VERSION + 1)
    assert len(AutoConfig.from_pretrained(folder).layer_shapes) == 2
    assert main(["inspect", str(folder)]) == 0
    assert main(["export", str(folder), "--to", "padded", "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("version", [None, "1", 0, 1.0, True])
def test_what_is_no_version_is_refused(version: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(["inspect", str(with_format(tmp_path / "odd", version))], capsys)
    assert f"format_version {version!r}" in line
