"""GGUF files written here with gguf's own writer, the way llama.cpp stores these architectures."""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from intraslice.checkpoint import gguf as conversion
from intraslice.checkpoint.gguf import cache_folder, convert_gguf
from intraslice.checkpoint.reader import open_folder
from intraslice.checkpoint.source import open_checkpoint
from intraslice.errors import CheckpointError, MissingExtraError, OutputError, UnsupportedModelError
from support.progress import Notes
from support.tolerances import READ_BACK

gguf = pytest.importorskip("gguf")

from support.gguf_files import write_gguf  # noqa: E402 - gguf may be missing

Q8_0, F16, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32


def one_sentence(caught: pytest.ExceptionInfo[Exception], *words: str) -> None:
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message


def nothing_left() -> bool:
    folder = cache_folder()
    return not folder.exists() or list(folder.iterdir()) == []


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTRASLICE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("quantization", [F32, F16, Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_converted_weights_are_those_of_transformers_bit_for_bit(
    tmp_path: Path, family: str, quantization: Any
) -> None:
    path = tmp_path / "model.gguf"
    dense = write_gguf(path, family, quantization)
    checkpoint = open_checkpoint(str(path))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.folder)

    assert checkpoint.name == str(path)
    assert checkpoint.dtype == torch.float32
    assert checkpoint.spec.name == family
    assert getattr(checkpoint.config, "quantization_config", None) is None
    for name, tensor in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens).logits, reference(tokens).logits, **READ_BACK)
        if quantization is F32:
            torch.testing.assert_close(loaded(tokens).logits, dense(tokens).logits, **READ_BACK)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert tokenizer("the cat")["input_ids"] == expected("the cat")["input_ids"]


def test_fused_phi3(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    dense = write_gguf(path, "phi3", fields={"attention.sliding_window": 64})
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.config.sliding_window == 64
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_tied_embeddings(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    dense = write_gguf(path, "llama", tie_word_embeddings=True)
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.tied
    assert torch.equal(checkpoint.load_rest()["model.embed_tokens.weight"], dense.state_dict()["lm_head.weight"])


def test_many_row_blocks_give_the_same_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", Q8_0)
    whole = open_folder(convert_gguf(path))
    monkeypatch.setattr("intraslice.checkpoint.gguf._CHUNK_ELEMENTS", 100)
    monkeypatch.setattr("intraslice.checkpoint.gguf._SHARD_BYTES", 30_000)
    monkeypatch.setenv("INTRASLICE_CACHE", str(tmp_path / "other"))
    pieces = open_folder(convert_gguf(path))
    assert (pieces.folder / "model.safetensors.index.json").exists()
    assert pieces.fingerprint() == whole.fingerprint()
    assert all(torch.equal(pieces.load_layer(1)[name], t) for name, t in whole.load_layer(1).items())


def test_converted_once_and_again_when_the_content_changes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    first = convert_gguf(path)
    written = (first / "model.safetensors").stat().st_mtime_ns
    renamed = path.rename(tmp_path / "renamed.gguf")
    assert convert_gguf(renamed) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    write_gguf(path, "llama", seed=1)
    assert convert_gguf(path) != first
    assert len(list(cache_folder().iterdir())) == 2


def test_a_damaged_conversion_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    folder = convert_gguf(path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def flip_last(name: str) -> None:
        content = before[name]
        (folder / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])

    damages: tuple[Callable[[], object], ...] = (
        *(partial(flip_last, name) for name in before),
        (folder / "model.safetensors").unlink,
        # What was converted before there were digests.
        (folder / "intraslice_files.json").unlink,
        lambda: (folder / "model.safetensors.index.json").write_text("{}"),
    )
    for damage in damages:
        damage()
        notes = Notes()
        assert convert_gguf(path, progress=notes) == folder
        assert any("is not what was written: it is converted again" in note for note in notes.notes)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(cache_folder().iterdir()) == [folder]
    notes = Notes()
    convert_gguf(path, progress=notes)
    assert notes.notes == []


def test_two_processes_may_mend_one_conversion_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the faster one has made stays where it is, because that one reads it already."""
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    weights = convert_gguf(path) / "model.safetensors"
    weights.write_bytes(b"")
    convert, made = conversion._convert, []

    def slower(*arguments: Any) -> None:
        monkeypatch.setattr(conversion, "_convert", convert)
        convert_gguf(path)
        made.append(weights.stat().st_ino)
        convert(*arguments)

    monkeypatch.setattr(conversion, "_convert", slower)
    assert convert_gguf(path) == weights.parent
    assert made == [weights.stat().st_ino]
    assert list(cache_folder().iterdir()) == [weights.parent]


def test_leftovers_of_killed_conversions_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    old, fresh = cache_folder() / "a.partial-1", cache_folder() / "b.partial-2"
    old.mkdir(parents=True)
    fresh.mkdir()
    os.utime(old, (0, 0))
    convert_gguf(path)
    assert not old.exists() and fresh.exists()


@pytest.mark.parametrize("kept", [0, 3, 40, 3000, -1, -50_000])
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    one_sentence(caught, "truncated or corrupt")
    assert nothing_left()


def test_a_file_that_only_has_the_name(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    one_sentence(caught, "truncated or corrupt")


def test_unsupported_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError) as caught:
        open_checkpoint(str(path))
    one_sentence(caught, "gemma", "llama, qwen2, phi3")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"left_out": "blk.1.ffn_up.weight"}, "no tensor for 'model.layers.1.mlp.up_proj.weight'"),
        ({"extra": {"rope_freqs.weight": torch.ones(4)}}, "rope_freqs.weight"),
        ({"fields": {"rope.scaling.type": "yarn"}}, "scales its rotary embedding (yarn)"),
    ],
)
def test_what_a_conversion_would_lose_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", **options)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    one_sentence(caught, words)
    assert nothing_left()


def test_partial_rotation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "phi3", fields={"rope.dimension_count": 6})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    one_sentence(caught, "rotates 6 of 8")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="the disk is full"):
        open_checkpoint(str(path))
    assert nothing_left()


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    real_import = builtins.__import__

    def no_gguf(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", no_gguf)
    with pytest.raises(MissingExtraError) as caught:
        open_checkpoint(str(path))
    one_sentence(caught, "intraslice[gguf]")
