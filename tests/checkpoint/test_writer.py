from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from intraslice.checkpoint.ownership import LIST_FILE, write_list
from intraslice.checkpoint.reader import open_folder
from intraslice.checkpoint.tensorfile import (
    DTYPES,
    StoredTensor,
    TensorFile,
    TensorSlot,
    read_sealed,
    read_slots,
    write_tensors,
)
from intraslice.checkpoint.writer import (
    assemble,
    check_output,
    plan_shards,
    publish,
    save_side_files,
    shard_names,
)
from intraslice.data.sampled_rows import SampledRows
from intraslice.digests import file_digest
from intraslice.errors import OutputError
from intraslice.files import temporary_beside, write_text
from intraslice.runtime import RUNTIME_FILES

Folder = Callable[..., Path]

TENSORS = {
    "a.bias": torch.arange(3, dtype=torch.float16),
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "rope_index": torch.tensor([[0, 2], [1, 3]]),
    "flag": torch.tensor([True, False, True]),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "nothing": torch.empty(0, 4),
}


def write_layers(folder: Path, checkpoint_folder: Path) -> tuple[list[Path], list[str]]:
    checkpoint = open_folder(checkpoint_folder)
    files, prefixes = [], []
    for index in range(checkpoint.num_layers):
        files.append(folder / f"{index:05d}.safetensors")
        prefixes.append(checkpoint.layer_prefix(index))
        write_tensors(files[-1], checkpoint.load_layer(index))
    return files, prefixes


def test_other_readers_read_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.safetensors"
    assert write_tensors(path, TENSORS) == file_digest(path)
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert read_slots(path)["a.weight"] == TensorSlot(torch.float32, (2, 3))
    assert [entry.name for entry in path.parent.iterdir()] == ["file.safetensors"]


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "f.safetensors", {"t": matrix.T, "part": matrix[:, 1:3]})
    loaded = load_file(tmp_path / "f.safetensors")
    assert torch.equal(loaded["t"], matrix.T)
    assert torch.equal(loaded["part"], matrix[:, 1:3])


def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    write_tensors(path, TENSORS)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0


@pytest.mark.parametrize("max_shard_bytes", [1, 40_000, 1 << 30])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_assembled_layers_are_the_model_again(
    tiny_folder: Folder, tmp_path: Path, family: str, max_shard_bytes: int
) -> None:
    source = tiny_folder(family)
    checkpoint = open_folder(source)
    files, prefixes = write_layers(tmp_path / "layers", source)
    out = tmp_path / "out"

    nbytes = assemble(out, files, prefixes, checkpoint.load_rest(), max_shard_bytes)
    save_side_files(out, checkpoint.config, source)

    shards = sorted(out.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in shards) == nbytes
    assert (out / "model.safetensors.index.json").exists() == (len(shards) > 1)
    if max_shard_bytes == 40_000:
        # A header comes on top of the tensors.
        assert len(shards) > 2 and all(path.stat().st_size < 42_000 for path in shards)
    model = AutoModelForCausalLM.from_pretrained(source)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert open_folder(out).fingerprint() == checkpoint.fingerprint()
    assert AutoTokenizer.from_pretrained(out)("abc") == AutoTokenizer.from_pretrained(source)("abc")


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12), limit=st.integers(9, 30))
def test_shards_are_those_of_the_hub_library(sizes: list[int], limit: int) -> None:
    slots = {f"t{i}": TensorSlot(torch.uint8, (size,)) for i, size in enumerate(sizes)}
    expected = split_state_dict_into_shards_factory(
        slots,
        get_storage_size=lambda slot: slot.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    shards = plan_shards(slots, limit)
    assert dict(zip(shard_names(len(shards)), shards, strict=True)) == expected.filename_to_tensors


def test_a_tensor_larger_than_a_shard_keeps_its_place() -> None:
    slots = {name: TensorSlot(torch.uint8, (size,)) for name, size in (("a", 1), ("b", 10), ("c", 1))}
    assert plan_shards(slots, 5) == [["a"], ["b"], ["c"]]


def test_what_is_carried_over_is_copied_bit_by_bit(tmp_path: Path) -> None:
    """With dtypes of its own, over several shards, from several files."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    write_tensors(first, TENSORS)
    write_tensors(second, {"other": torch.arange(40.0)})
    carried = {
        f"kept.{name}": StoredTensor(path, name, code, tuple(tensor.shape))
        for path, tensors in ((first, TENSORS), (second, {"other": torch.arange(40.0)}))
        for name, tensor in tensors.items()
        for code, dtype in DTYPES.items()
        if dtype == tensor.dtype
    }
    out = tmp_path / "out"
    assemble(out, [], [], {"own": torch.ones(4)}, 64, carried)
    assert len(list(out.glob("*.safetensors"))) > 2
    found = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found.keys() == {"own", *carried}
    for name, tensor in {**TENSORS, "other": torch.arange(40.0)}.items():
        assert found[f"kept.{name}"].dtype == tensor.dtype and torch.equal(found[f"kept.{name}"], tensor)


def test_side_files(make_folder: Folder, tmp_path: Path) -> None:
    source = make_folder("llama")
    (source / "LICENSE.txt").write_text("terms")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.py").write_text("raise SystemExit")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 10], "do_sample": True}))
    out = tmp_path / "out"
    save_side_files(out, open_folder(source).config, source)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE.txt"} < names
    assert {"chat_template.jinja", *(Path(path).name for path in RUNTIME_FILES)} < names
    assert "notes.py" not in names
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [257, 10]
    (source / "generation_config.json").unlink()
    save_side_files(out, open_folder(source).config, source)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 257


# Nothing half-written under a final name, and nothing left behind.


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.usefixtures("full_disk")
def test_full_disk_leaves_no_tensor_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk is full"):
        write_tensors(tmp_path / "f.safetensors", TENSORS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("full_disk")
def test_full_disk_leaves_no_text_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk is full"):
        write_text(tmp_path / "result.json", "{}")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_file_of_before(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    write_tensors(tmp_path / "f.safetensors", {"a": torch.ones(2)})
    request.getfixturevalue("full_disk")
    with pytest.raises(OutputError):
        write_tensors(tmp_path / "f.safetensors", {"a": torch.zeros(2)})
    assert torch.equal(load_file(tmp_path / "f.safetensors")["a"], torch.ones(2))


def test_a_limit_met_in_the_middle_of_a_tensor(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    # A real refusal of the operating system, not a patched one: files may not grow beyond 64 KiB.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OutputError) as caught:
            write_tensors(tmp_path / "f.safetensors", {"a": torch.ones(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_no_file(tmp_path: Path) -> None:
    slots = {"a": TensorSlot(torch.float32, (2,)), "b": TensorSlot(torch.float32, (2,))}
    with pytest.raises(KeyboardInterrupt), TensorFile(tmp_path / "f.safetensors", slots) as file:
        file.write("a", torch.ones(2))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_write_one_kept_file_at_the_same_time(tmp_path: Path) -> None:
    path, slots = tmp_path / "f.safetensors", {"a": TensorSlot(torch.float32, (2,))}
    first, second = (TensorFile(path, slots, sealed_for="this") for _ in range(2))
    first.write("a", torch.ones(2))
    second.write("a", torch.zeros(2))
    for file, value in ((first, 1.0), (second, 0.0)):
        file.close()
        assert torch.equal(read_sealed(path, "this")["a"], torch.full((2,), value))
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_may_keep_one_batch_of_rows_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, flush = SampledRows(tmp_path, ["decides"], ["seed"]), os.fsync
    tokens = torch.arange(4)[None]

    def second(descriptor: int) -> None:
        flush(descriptor)
        monkeypatch.setattr(os, "fsync", flush)
        rows.write(0, tokens, 1)
        kept.append(rows.read(0))

    kept: list[torch.Tensor | None] = []
    monkeypatch.setattr(os, "fsync", second)
    write_text(rows._file(0, last=False), "{}", shared=True)
    assert kept[0] is not None and torch.equal(kept[0], tokens)
    rows.write(0, tokens, 1)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_what_was_left_of_shared_files_long_ago_is_removed(tmp_path: Path) -> None:
    fresh, old, foreign = (temporary_beside(tmp_path / f"{name}.safetensors", shared=True) for name in "abc")
    foreign = foreign.with_suffix(".txt")
    for left in (fresh, old, foreign):
        left.write_text("")
    for left in (old, foreign):
        os.utime(left, (0, 0))
    write_tensors(tmp_path / "a.safetensors", TENSORS, sealed_for="this")
    assert set(tmp_path.iterdir()) == {tmp_path / "a.safetensors", fresh, foreign}


def test_assemble_on_a_full_disk_says_so(tiny_folder: Folder, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = tiny_folder("llama")
    files, prefixes = write_layers(tmp_path / "layers", source)
    rest = open_folder(source).load_rest()
    request.getfixturevalue("full_disk")
    with pytest.raises(OutputError, match="the disk is full"):
        assemble(tmp_path / "out", files, prefixes, rest, 40_000)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_tensors(tmp_path / "file" / "f.safetensors", TENSORS)


# The output folder.


def make_checkpoint(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(text)
    write_list(folder)
    return folder


def test_publish_gives_the_final_name(tmp_path: Path) -> None:
    temp = make_checkpoint(tmp_path / "out.partial", "new")
    publish(temp, tmp_path / "models" / "out", overwrite=False)
    assert (tmp_path / "models" / "out" / "config.json").read_text() == "new"
    assert not temp.exists()


def test_publish_replaces_a_checkpoint_only_when_told(tmp_path: Path) -> None:
    temp = make_checkpoint(tmp_path / "temp", "new")
    out = make_checkpoint(tmp_path / "out", "old")
    (out / "old_file").write_text("")
    write_list(out)
    with pytest.raises(OutputError, match="already exists"):
        publish(temp, out, overwrite=False)
    assert (out / "config.json").read_text() == "old"
    publish(temp, out, overwrite=True)
    assert (out / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "old_file").exists()


def test_publish_puts_the_old_checkpoint_back_when_the_rename_fails(tmp_path: Path) -> None:
    out = make_checkpoint(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="cannot write"):
        publish(tmp_path / "missing", out, overwrite=True)
    assert (out / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="already exists.*--overwrite"):
        check_output(tmp_path, overwrite=False)
    check_output(tmp_path / "new" / "folder", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_only_checkpoints_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match=r"holds 'thesis\.tex', which intraslice has not written"):
        check_output(tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="not a checkpoint"):
        check_output(tmp_path / "thesis.tex", overwrite=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    check_output(empty, overwrite=True)


@pytest.mark.parametrize("foreign", ["notes.txt", "data/calibration.txt", "sub/config.json"])
def test_a_checkpoint_with_another_file_in_it_is_kept(foreign: str, tmp_path: Path) -> None:
    out = make_checkpoint(tmp_path / "out", "old")
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_text("mine")
    for call in (
        lambda: check_output(out, overwrite=True),
        lambda: publish(make_checkpoint(tmp_path / "temp", "new"), out, overwrite=True),
    ):
        with pytest.raises(OutputError, match=f"holds '{foreign}', which intraslice has not written"):
            call()
    assert (out / foreign).read_text() == "mine" and (out / "config.json").read_text() == "old"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"written_by": "intraslice", "files": 3}', "[" * 100_000])
def test_a_list_that_cannot_be_read_lists_nothing(content: str, tmp_path: Path) -> None:
    out = make_checkpoint(tmp_path / "out", "old")
    (out / LIST_FILE).write_text(content)
    with pytest.raises(OutputError, match=r"holds 'config\.json', which intraslice has not written"):
        check_output(out, overwrite=True)


def test_a_link_in_a_checkpoint_is_a_file_of_its_own(tmp_path: Path) -> None:
    out, data = make_checkpoint(tmp_path / "out", "old"), tmp_path / "data"
    data.mkdir()
    (out / "data").symlink_to(data)
    with pytest.raises(OutputError, match="holds 'data', which intraslice has not written"):
        check_output(out, overwrite=True)


def test_a_checkpoint_of_0_1_without_a_list_is_replaced(tmp_path: Path) -> None:
    out = make_checkpoint(tmp_path / "out", "{}")
    (out / LIST_FILE).unlink()
    for name in ("model-00001-of-00002.safetensors", "modeling_intraslice.py", "tokenizer.json", "README.md"):
        (out / name).write_text("")
    (out / "result.json").write_text(json.dumps({"requested_sparsity": 0.3, "layers": []}))
    check_output(out, overwrite=True)
    (out / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match=r"holds 'thesis\.tex'"):
        check_output(out, overwrite=True)


def test_an_output_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OutputError, match="leads nowhere"):
        check_output(loop, overwrite=True)


def test_the_model_itself_is_never_the_output(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "{}")
    link = tmp_path / "link"
    link.symlink_to(model)
    with pytest.raises(OutputError, match="the model itself"):
        check_output(link, overwrite=True, source=model)


def test_a_place_that_cannot_be_written_is_refused_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a writable folder"):
        check_output(tmp_path / "file" / "out", overwrite=False)
