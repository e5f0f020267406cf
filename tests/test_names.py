"""One rule for what a name of a model stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

import intraslice
from intraslice import api
from intraslice.errors import CheckpointError
from intraslice.loading import load_config
from intraslice.names import NameKind, kind_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("folder", NameKind.FOLDER),
        ("./folder", NameKind.FOLDER),
        (".", NameKind.FOLDER),
        ("org/model", NameKind.FOLDER),
        ("file.gguf", NameKind.FILE),
        ("weights.safetensors", NameKind.FILE),
        ("smollm2-135m", NameKind.BUILT_IN),
        ("gpt2", NameKind.HUB),
        ("org/other", NameKind.HUB),
        ("two words", NameKind.HUB),
        ("", NameKind.MISSING_PATH),
        ("./nothing", NameKind.MISSING_PATH),
        ("/no/such", NameKind.MISSING_PATH),
        ("/no.gguf", NameKind.MISSING_PATH),
        ("~/no-such-model", NameKind.MISSING_PATH),
        ("a/b/c", NameKind.MISSING_PATH),
        ("other.gguf", NameKind.MISSING_GGUF),
        ("org/other.GGUF", NameKind.MISSING_GGUF),
    ],
)
def test_kinds(name: str, kind: NameKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for folder in ("folder", "org/model"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("file.gguf", "weights.safetensors"):
        (tmp_path / file).touch()
    assert kind_of(name, tmp_path) is kind
    monkeypatch.chdir(tmp_path)
    assert kind_of(name) is kind


def test_what_is_here_wins_over_a_built_in_name(tmp_path: Path):
    (tmp_path / "smollm2-135m").mkdir()
    assert kind_of("smollm2-135m", tmp_path) is NameKind.FOLDER


def test_a_file_that_is_no_model_is_named_when_only_its_config_is_wanted(tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        load_config(str(tmp_path / "model.safetensors"))


def test_the_package_offers_what_the_interface_has():
    own = {name for name, value in vars(api).items() if callable(value) and value.__module__ == api.__name__}
    public = {name for name in own if not name.startswith("_")}
    assert public - {"analyse"} == set(intraslice.__all__) - {"__version__"}
    assert all(getattr(intraslice, name) is getattr(api, name) for name in public - {"analyse"})
    with pytest.raises(AttributeError):
        _ = intraslice.analyse  # type: ignore[attr-defined]
