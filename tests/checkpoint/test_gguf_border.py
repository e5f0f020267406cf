"""GGUF files of a stranger are measured before a library reads them: counts, sizes, names of the tensors."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import pytest

pytest.importorskip("gguf")

from intraslice.checkpoint.gguf import cache_folder, convert_gguf
from intraslice.errors import CheckpointError, IntraSliceError
from intraslice.loading import load_config
from support.gguf_files import write_gguf


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, "llama")
    return path.read_bytes()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTRASLICE_CACHE", str(tmp_path / "cache"))


def refused(path: Path) -> str:
    start = time.monotonic()
    sentences = []
    for read in (lambda: load_config(str(path)), lambda: convert_gguf(path)):
        with pytest.raises(IntraSliceError) as caught:
            read()
        sentences.append(str(caught.value))
    assert time.monotonic() - start < 10  # some took minutes
    assert all("\n" not in sentence and len(sentence) < 500 for sentence in sentences)
    assert not cache_folder().exists() or list(cache_folder().iterdir()) == []
    return sentences[-1]


def with_number(content: bytes, key: str, number: int) -> bytes:
    at = content.index(key.encode()) + len(key) + 4
    return content[:at] + struct.pack("<I", number) + content[at + 4 :]


@pytest.mark.parametrize("length", [0, 3, 4, 7, 8, 12, 20, 24, 31, 32, 100, 1000])
def test_cut_files(length: int, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content[:length])
    assert "truncated or corrupt" in refused(tmp_path / "a.gguf")


def test_a_file_without_its_last_bytes_or_with_more(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content[:-40])
    assert "bytes more" in refused(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(content)
    os.truncate(tmp_path / "a.gguf", 1 << 33)  # sparse
    assert "its tensors end at byte" in refused(tmp_path / "a.gguf")


@pytest.mark.parametrize("at", [8, 16])
@pytest.mark.parametrize("count", [2**60, 2**63, 10**6, 2**20])
def test_counts_beyond_the_file(at: int, count: int, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content[:at] + struct.pack("<Q", count) + content[at + 8 :])
    assert "truncated or corrupt" in refused(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("key", "number"),
    [
        *(("llama.attention.head_count", number) for number in (0, 3, 10**6)),
        *(("llama.attention.head_count_kv", number) for number in (0, 3, 10**6)),
        *(("llama.block_count", number) for number in (0, 1, 10**6, 2**32 - 1)),
        *(("llama.rope.dimension_count", number) for number in (0, 5, 2**31)),
        *(("llama.embedding_length", number) for number in (0, 33, 2**32 - 1)),
        *(("llama.feed_forward_length", number) for number in (0, 2**32 - 1)),
    ],
)
def test_numbers_that_contradict_the_tensors(key: str, number: int, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(with_number(content, key, number))
    start = time.monotonic()
    with pytest.raises(IntraSliceError) as caught:
        convert_gguf(path)
    assert "\n" not in str(caught.value) and time.monotonic() - start < 10
    assert not cache_folder().exists() or list(cache_folder().iterdir()) == []


def test_a_whole_file_is_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    assert load_config(str(tmp_path / "a.gguf")).num_hidden_layers == 3
    with pytest.raises(CheckpointError, match="there is no folder or file"):
        load_config(str(tmp_path / "b.gguf"))
