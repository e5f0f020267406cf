"""Disks that are full, read-only, or gone; and two processes at one output: one sentence, and nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from intraslice.checkpoint.ownership import verify_folder
from intraslice.checkpoint.workfolder import LOCK, staged_output, work_path
from intraslice.errors import IntraSliceError, OutputError
from intraslice.files import reserve
from support.progress import Notes, StopAt
from support.prune import prune

Folder = Callable[..., Path]


def test_space_is_reserved_before_a_file_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "hidden.bin"
    reserve(path, 1 << 20)
    blocks = getattr(path.stat(), "st_blocks", None)
    assert path.stat().st_size == 1 << 20 and (blocks is None or blocks * 512 >= 1 << 20)


@pytest.mark.parametrize("how", ["reserved", "written"])
def test_a_disk_without_room_for_hidden_states_is_one_sentence(
    how: str, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a file system that reserves, and with one that cannot, where zeros are written."""

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC if how == "reserved" else errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    if how == "written":
        reserve(tmp_path / "file", 100)
        assert (tmp_path / "file").read_bytes() == bytes(100)
        return
    with pytest.raises(OutputError, match="the disk is full while writing .*hidden"):
        prune(tiny_folder("llama"), tmp_path / "out", run__hidden_states="disk")
    assert not list(tmp_path.rglob("hidden.bin")) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("call", "number", "sentence"),
    [
        (3, errno.ENOSPC, "the disk is full"),
        (11, errno.ENOSPC, "the disk is full"),
        (5, errno.EROFS, "cannot write"),
        (8, errno.EIO, "cannot write"),
    ],
)
def test_a_disk_that_takes_no_more_loses_nothing(
    call: int, number: int, sentence: str, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full, read-only or broken from a certain flush on; when it is mended, the run ends as if nothing had been.

    No file system is made read-only: a system refuses that while files are open in it.
    """
    left, flush = [call], os.fsync

    def full(descriptor: int) -> None:
        if left[0] == 0:
            raise OSError(number, os.strerror(number))
        left[0] -= 1
        flush(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=sentence):
            prune(tiny_folder("llama"), tmp_path / "out", allocation__rule="uniform")
    assert not (tmp_path / "out").exists()
    prune(tiny_folder("llama"), tmp_path / "out", allocation__rule="uniform", resume=True)
    assert not verify_folder(tmp_path / "out", "out").changed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_work_folder_that_vanishes_is_one_sentence(tiny_folder: Folder, tmp_path: Path) -> None:
    class Vanish(Notes):
        """Deletes the work folder when some layers are finished."""

        @contextmanager
        def step(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
            done = [0]

            def advance(units: int) -> None:
                done[0] += units
                if description == "layers" and done[0] == 2:
                    shutil.rmtree(tmp_path / "out.partial")

            yield advance

    with pytest.raises(IntraSliceError, match="out.partial"):
        prune(tiny_folder("llama"), tmp_path / "out", progress=Vanish())
    assert not (tmp_path / "out").exists()


# Two processes.


def test_a_prune_refuses_what_another_one_works_on(tiny_folder: Folder, tmp_path: Path) -> None:
    """From the middle of the first one, which then goes on as if nothing had been."""
    folder, out = tiny_folder("llama"), tmp_path / "out"
    refused: list[str] = []

    class Second(Notes):
        def step(self, description: str, total: int):
            for how in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(OutputError, match="another run is working in") as caught:
                    prune(folder, out, **how)
                refused.append(str(caught.value))
            return super().step(description, total)

    prune(folder, out, progress=Second())
    assert len(refused) >= 6 and not verify_folder(out, "out").changed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_exports_of_one_name(tmp_path: Path) -> None:
    with staged_output(tmp_path / "out", "export") as work:
        (work.staging / "config.json").write_text("{}")
        with pytest.raises(OutputError, match="another run is working in"), staged_output(tmp_path / "out", "export"):
            raise AssertionError
        work.publish(overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_of_a_process_that_died_is_free(tiny_folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / LOCK).write_text("")
    prune(tiny_folder("llama"), tmp_path / "out", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# What is ours.


def test_a_link_as_the_output_is_replaced_and_what_it_points_at_is_kept(tiny_folder: Folder, tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    prune(tiny_folder("llama"), real)
    before = (real / "model.safetensors").read_bytes()
    link.symlink_to(real)
    prune(tiny_folder("llama"), link, overwrite=True, sparsity=0.2)
    assert not link.is_symlink() and (real / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("where", ["out", "out.partial"])
def test_inputs_in_what_would_be_replaced_are_refused(where: str, make_folder: Folder, tmp_path: Path) -> None:
    from intraslice.cli.app import main

    model = make_folder("llama")
    folder = tmp_path / where
    folder.mkdir()
    shutil.move(model, folder / "model")
    text = folder / "text.txt"
    text.write_text("words")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    given = ["-o", str(tmp_path / "out"), "--sparsity", "0.3", "--overwrite"]
    assert main(["prune", str(folder / "model"), *given]) == 2
    assert main(["prune", "smollm2-135m", "--calibration", str(text), *given]) == 2
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_manifest_of_another_program_is_kept(tiny_folder: Folder, tmp_path: Path) -> None:
    work = work_path(tmp_path / "out")
    work.mkdir()
    (work / "manifest.json").write_text('{"name": "a web application"}')
    for how in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(OutputError, match="holds 'manifest.json', which intraslice has not written"):
            prune(tiny_folder("llama"), tmp_path / "out", **how)
    assert [path.name for path in work.iterdir()] == ["manifest.json"]


def test_an_interrupted_run_of_another_kind_is_kept(tiny_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_folder("llama"), tmp_path / "out", progress=StopAt("layers", 0))
    (tmp_path / "out.partial" / "layers" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds 'layers/notes.txt'"):
        prune(tiny_folder("llama"), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out.partial" / "layers" / "00000.safetensors").exists()


# A real small disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 500 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("needs the right to mount a file system")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=500k", "none", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("cannot mount a file system here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_real_disk_that_is_full_at_every_stage(small_disk: Path, tiny_folder: Folder, tmp_path: Path) -> None:
    """Filled to many levels by somebody else's file; with room again, the run goes on to the same weights."""
    folder = tiny_folder("llama")
    prune(folder, tmp_path / "whole")
    refused = 0
    for free in range(10, 480, 10):
        filler = small_disk / "filler"
        filler.write_bytes(bytes(1024 * (480 - free)))
        try:
            prune(folder, small_disk / "out", run__hidden_states="disk")
        except OutputError as error:
            refused += 1
            assert "the disk is full" in str(error)
            filler.unlink()
            prune(folder, small_disk / "out", resume=True)
        one, other = (place / "model.safetensors" for place in (small_disk / "out", tmp_path / "whole"))
        assert one.read_bytes() == other.read_bytes()
        shutil.rmtree(small_disk / "out")
        filler.unlink(missing_ok=True)
        assert list(small_disk.iterdir()) == []
    assert refused > 10
