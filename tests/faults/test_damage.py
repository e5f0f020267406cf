"""Damage to what is kept is noticed: flipped and cut bytes, changed inputs, swapped files, foreign manifests."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from intraslice.checkpoint.ownership import check_intact, verify_folder
from intraslice.checkpoint.reader import Checkpoint, open_folder
from intraslice.checkpoint.tensorfile import read_sealed, write_tensors
from intraslice.checkpoint.workfolder import LOCK, MANIFEST
from intraslice.cli.app import main
from intraslice.digests import UNSEALED, bytes_digest, file_digest, is_sealed, seal
from intraslice.errors import CheckpointError, IntraSliceError, OutputError, ResumeMismatchError
from support.progress import Notes, StopAt
from support.prune import prune, weights_of

Folder = Callable[..., Path]


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Change one bit of a file where it lies."""
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.fixture(scope="module")
def interrupted(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `out.partial` of a run that was interrupted in its last layer: read only."""
    root = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_folder("llama"), root / "out", progress=StopAt("layers", 1))
    return root


@pytest.fixture
def again(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of `interrupted`."""
    return Path(shutil.copytree(interrupted, tmp_path / "again"))


@pytest.fixture(scope="module")
def whole(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint: read only."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prune(tiny_folder("llama"), out)
    return out


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK]


def test_a_seal_covers_every_bit() -> None:
    content = seal('{"xxh3_128": "' + UNSEALED + '", "value": 1}').encode()
    assert is_sealed(content)
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            assert not is_sealed(bytes(damaged)), (position, bit)
    assert not is_sealed(content[:-1]) and not is_sealed(content + b" ") and not is_sealed(b"")


def test_a_sealed_file_is_read_only_whole_and_for_its_purpose(tmp_path: Path) -> None:
    path = tmp_path / "sums.safetensors"
    tensors = {"a": torch.arange(6.0), "n": torch.tensor([3], dtype=torch.int64)}
    write_tensors(path, tensors, sealed_for="this")
    found = read_sealed(path, "this")
    assert found.keys() == tensors.keys() and torch.equal(found["a"], tensors["a"])
    with pytest.raises(CheckpointError, match="made for something else"):
        read_sealed(path, "that")
    content = path.read_bytes()
    for position in range(len(content)):
        flip(path, position, position % 8)
        with pytest.raises(CheckpointError):
            read_sealed(path, "this")
        path.write_bytes(content)
    for length in (0, 7, 8, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_sealed(path, "this")


def test_the_digest_of_a_file_does_not_depend_on_the_blocks(tmp_path: Path) -> None:
    content = random.Random(0).randbytes((1 << 22) + 5)
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == bytes_digest(content)


def test_every_file_of_the_work_folder_is_checked(interrupted: Path) -> None:
    """What this checks is all there is: the manifest, the sums of the gradients, and the finished layers."""
    names = [path.relative_to(interrupted / "out.partial").as_posix() for path in files_of(interrupted / "out.partial")]
    assert names == ["gradients.safetensors", "layers/00000.safetensors", "layers/00001.safetensors", MANIFEST]
    listed = json.loads((interrupted / "out.partial" / MANIFEST).read_text())["files"]
    assert sorted(listed) == names[1:3]


@pytest.mark.parametrize("name", ["layers/00000.safetensors", "layers/00001.safetensors", MANIFEST])
def test_a_flipped_bit_of_the_work_folder_is_noticed(name: str, again: Path, tiny_folder: Folder) -> None:
    path, chance = again / "out.partial" / name, random.Random(1)
    content = path.read_bytes()
    # The first byte of all, and a hundred others.
    for position in [0, *(chance.randrange(len(content)) for _ in range(20))]:
        flip(path, position, chance.randrange(8))
        with pytest.raises((CheckpointError, OutputError), match="out.partial"):
            prune(tiny_folder("llama"), again / "out", resume=True)
        path.write_bytes(content)
    for damaged in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises((CheckpointError, OutputError), match="out.partial"):
            prune(tiny_folder("llama"), again / "out", resume=True)
    path.unlink()
    path.mkdir()
    with pytest.raises((CheckpointError, OutputError), match="out.partial"):
        prune(tiny_folder("llama"), again / "out", resume=True)


@pytest.mark.parametrize("inside", [None, "notes.txt"])
def test_a_folder_in_the_place_of_the_hidden_states(inside: str | None, again: Path, tiny_folder: Folder) -> None:
    place = again / "out.partial" / "hidden.bin"
    place.mkdir()
    if inside is not None:
        (place / inside).write_text("mine")
    with pytest.raises(OutputError, match="hidden.bin"):
        prune(tiny_folder("llama"), again / "out", resume=True, run__hidden_states="disk")
    assert place.is_dir() and (inside is None or (place / inside).read_text() == "mine")
    assert not (again / "out").exists()


def test_the_run_goes_on_when_nothing_is_damaged(again: Path, whole: Path, tiny_folder: Folder) -> None:
    prune(tiny_folder("llama"), again / "out", resume=True)
    assert (again / "out/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_what_a_killed_run_was_measuring_goes_when_it_goes_on(again: Path, whole: Path, tiny_folder: Folder) -> None:
    left, foreign = (again / f"out.partial/.{name}.safetensors.0123abcd.tmp" for name in ("gradients", "other"))
    left.write_bytes(b"half of it")
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_folder("llama"), again / "out", resume=True, progress=StopAt("layers", 0))
    assert not left.exists()
    left.write_bytes(b"half of it")
    foreign.write_bytes(b"of somebody else")
    with pytest.raises(OutputError, match="other.safetensors"):
        prune(tiny_folder("llama"), again / "out", overwrite=True)
    foreign.unlink()
    prune(tiny_folder("llama"), again / "out", overwrite=True)
    assert weights_equal(again / "out", whole) and not (again / "out.partial").exists()


def test_swapped_layers_are_noticed(again: Path, tiny_folder: Folder) -> None:
    first, second = (again / f"out.partial/layers/0000{index}.safetensors" for index in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(CheckpointError, match="'layers/00000.safetensors' of the interrupted run"):
        prune(tiny_folder("llama"), again / "out", resume=True)


def test_damaged_gradients_are_measured_again(whole: Path, tiny_folder: Folder, tmp_path: Path) -> None:
    """Of an interrupted run, and those that several runs share."""
    shared = {"run__gradient_folder": str(tmp_path / "kept")}
    prune(tiny_folder("llama"), tmp_path / "first", **shared)
    (kept,) = (tmp_path / "kept").iterdir()
    for damage in (lambda: flip(kept, kept.stat().st_size - 3), lambda: kept.write_bytes(b"")):
        damage()
        notes = Notes()
        prune(tiny_folder("llama"), tmp_path / "next", overwrite=True, progress=notes, **shared)
        assert any("the gradients are measured again" in note for note in notes.notes)
        assert weights_equal(tmp_path / "next", whole)


def weights_equal(one: Path, other: Path) -> bool:
    ours, theirs = weights_of(one), weights_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "\xff\xfe",
        '{"written_by": "intraslice"}',
        '{\n "identity": {}}',
        "[" * 100_000,
        '{\n "written_by": "intraslice", "state": ' + "[" * 100_000,
    ],
)
def test_a_manifest_that_is_none_ends_in_one_sentence(content: str, again: Path, tiny_folder: Folder) -> None:
    (again / "out.partial" / MANIFEST).write_text(content, encoding="latin-1")
    for how in ({"resume": True}, {}):
        with pytest.raises(IntraSliceError) as caught:
            prune(tiny_folder("llama"), again / "out", **how)
        assert len(str(caught.value)) < 600


def test_a_sealed_manifest_of_another_form_is_refused(again: Path, tiny_folder: Folder) -> None:
    path = again / "out.partial" / MANIFEST
    manifest = json.loads(path.read_text())
    changes = {
        "records": lambda state: state.update(records=3),
        "seconds": lambda state: state.update(seconds="long"),
        "threads": lambda state: state.pop("threads"),
        "list its layers": lambda state: state["records"].reverse(),
    }
    for expected, change in changes.items():
        state = json.loads(json.dumps(manifest["state"]))
        change(state)
        text = json.dumps({**manifest, "xxh3_128": UNSEALED, "state": state}, indent=1)
        path.write_text(seal(text))
        with pytest.raises(CheckpointError, match=expected):
            prune(tiny_folder("llama"), again / "out", resume=True)


# The dense model.


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def one_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][17, 23] += 1e-3


def test_any_change_of_the_model_is_noticed(make_folder: Folder, tmp_path: Path) -> None:
    folder, out = make_folder("llama"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prune(folder, out, progress=StopAt("layers", 0))
    before = {path: path.read_bytes() for path in files_of(folder)}
    # Text that no field is read from.
    tokenizer = folder / "tokenizer_config.json"
    changes: dict[str, Callable[[], object]] = {
        "a weight of the model has changed": lambda: edit(folder, one_weight),
        "'tokenizer_config.json' of the model has changed": lambda: tokenizer.write_text(tokenizer.read_text() + "\n"),
        "'special_tokens_map.json' of the model has changed": lambda: (folder / "special_tokens_map.json").write_text(
            "{}"
        ),
        "the config of the model has changed": lambda: (folder / "config.json").write_text(
            json.dumps({**json.loads((folder / "config.json").read_text()), "rms_norm_eps": 1e-3})
        ),
    }
    for expected, change in changes.items():
        change()
        with pytest.raises(ResumeMismatchError, match=expected):
            prune(folder, out, resume=True)
        for path in files_of(folder):
            path.unlink() if path not in before else path.write_bytes(before[path])
    prune(folder, out, resume=True)


def test_weights_that_change_during_the_run_are_noticed(make_folder: Folder, tmp_path: Path) -> None:
    folder = make_folder("llama")

    class Zero(Notes):
        """Replaces all weights by zeros before the first layer is loaded."""

        def step(self, description: str, total: int):
            if description == "layers":
                edit(folder, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
            return super().step(description, total)

    with pytest.raises(CheckpointError, match="has changed while it was in use"):
        prune(folder, tmp_path / "out", progress=Zero())
    assert not (tmp_path / "out").exists()


def test_side_files_that_change_during_the_run_are_noticed(make_folder: Folder, tmp_path: Path) -> None:
    folder = make_folder("llama")

    class Edit(Notes):
        def step(self, description: str, total: int):
            (folder / "tokenizer_config.json").write_text("{}")
            return super().step(description, total)

    with pytest.raises(CheckpointError, match="'tokenizer_config.json' of .* has changed during the run"):
        prune(folder, tmp_path / "out", progress=Edit())
    assert not (tmp_path / "out").exists()


def test_the_fingerprint_reads_every_byte(make_folder: Folder) -> None:
    folder = make_folder("llama")
    path, chance = folder / "model.safetensors", random.Random(2)
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    seen = {open_folder(folder).fingerprint()}
    for count in range(30):
        flip(path, chance.randrange(start, path.stat().st_size), 0)
        seen.add(open_folder(folder).fingerprint())
        assert len(seen) == count + 2


# What decides nothing.


def identity_of(folder: Path, output: Path) -> dict[str, object]:
    with pytest.raises(KeyboardInterrupt):
        prune(folder, output, progress=StopAt("layers", 0))
    return json.loads((output.with_name("out.partial") / MANIFEST).read_text())["identity"]


def test_what_is_not_in_the_identity_changes_no_weight(again: Path, whole: Path, tiny_folder: Folder) -> None:
    """Another number of passes, of shards, of threads, and states on the disk, from the middle of the run on."""
    identity = json.loads((again / "out.partial" / MANIFEST).read_text())["identity"]
    free = {
        "run.boundary_bytes": 1,
        "run.hidden_states": "disk",
        "run.max_shard_bytes": 1 << 20,
        "run.gradient_folder": str(again / "gradients"),
    }
    assert not {name.partition(".")[2] for name in free} & {name.rpartition(".")[2] for name in identity}
    torch.set_num_threads(2)
    try:
        prune(
            tiny_folder("llama"),
            again / "out",
            resume=True,
            **{name.replace(".", "__"): value for name, value in free.items()},
        )
    finally:
        torch.set_num_threads(1)
    assert weights_equal(again / "out", whole)


def test_a_resumed_run_computes_with_the_threads_that_it_began_with(tiny_folder: Folder, tmp_path: Path) -> None:
    seen = []

    class Watch(StopAt):
        def step(self, description: str, total: int):
            seen.append(torch.get_num_threads())
            return super().step(description, total)

    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            prune(tiny_folder("llama"), tmp_path / "out", progress=Watch("layers", 0))
    finally:
        torch.set_num_threads(1)
    prune(tiny_folder("llama"), tmp_path / "out", resume=True, progress=Watch("none", 0))
    assert set(seen) == {2} and torch.get_num_threads() == 1


def test_other_versions_of_what_computes_are_refused(again: Path, tiny_folder: Folder, monkeypatch) -> None:
    monkeypatch.setattr("intraslice.engine.stages.version", lambda name: "9")
    with pytest.raises(ResumeMismatchError, match="versions.intraslice"):
        prune(tiny_folder("llama"), again / "out", resume=True)


# Finished checkpoints.


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of a finished checkpoint."""
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def test_every_flipped_bit_of_a_checkpoint_is_noticed(copied: Path) -> None:
    chance = random.Random(3)
    assert not verify_folder(copied, "it").changed
    for path in files_of(copied):
        content = path.read_bytes()
        for position in [0, len(content) - 1, *(chance.randrange(len(content)) for _ in range(30))]:
            flip(path, position, chance.randrange(8))
            assert verify_folder(copied, "it").changed == (path.name,)
            path.write_bytes(content)
        path.write_bytes(content[:-1])
        assert verify_folder(copied, "it").changed == (path.name,)
        path.write_bytes(content)
    check_intact(copied, "it")


def test_commands_refuse_a_damaged_checkpoint(copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(copied), "--verify"]) == 0
    assert "files are what was written" in capfd.readouterr().out
    flip(copied / "model.safetensors", (copied / "model.safetensors").stat().st_size - 2)
    out = ["-o", str(tmp_path / "out")]
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 100)
    for command in (
        ["inspect", str(copied), "--verify"],
        ["export", str(copied), "--to", "padded", *out],
        ["export", str(copied), "--to", "gguf", *out],
        ["heal", str(copied), *out, "--budget", "64"],
        ["eval", str(copied), "--text", str(text), "--seqlen", "16"],
    ):
        assert main(command) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line]
        assert "'model.safetensors' of" in line and "is not what was written" in line
    assert not (tmp_path / "out").exists()


def test_what_may_be_changed_and_what_may_not(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (copied / "README.md").write_text("my own words")
    (copied / "result.json").unlink()
    (copied / "notes.txt").write_text("mine")
    check_intact(copied, "it")
    found = verify_folder(copied, "it")
    assert (found.changed, found.missing, found.others) == (("README.md",), ("result.json",), ("notes.txt",))
    assert main(["inspect", str(copied), "--verify"]) == 2
    assert "'README.md'" in capfd.readouterr().err
    (copied / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="was not written with it"):
        check_intact(copied, "it")
    (copied / "intraslice_files.json").unlink()
    check_intact(copied, "it")
    assert main(["inspect", str(copied), "--verify"]) == 2
    assert "has no intraslice_files.json" in capfd.readouterr().err


def test_a_run_reads_its_model_once_more_than_it_needs(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the fingerprint, and no more often: the cost of large models."""
    read = []
    original = Checkpoint._read_identity
    monkeypatch.setattr(Checkpoint, "_read_identity", lambda self: read.append(self.name) or original(self))
    prune(tiny_folder("llama"), tmp_path / "out")
    assert len(read) == 1
