"""What a command may replace: files that it has written itself, and nothing else; and names that no file can have."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from intraslice.cli.app import main
from intraslice.comparison.tables import TABLE_BEGINS, check_outputs, write_outputs
from intraslice.errors import OutputError
from intraslice.exporters.gguf import MARK
from intraslice.report import PAGE_BEGINS
from support.progress import StopAt
from support.prune import prune
from support.pruned import FREE, save_pruned
from support.sample_comparison import sample

Folder = Callable[..., Path]


@pytest.fixture
def refused(capfd) -> Callable[..., str]:
    """Return a function that checks for status 2 and one line on standard error, and returns that line."""

    def call(*arguments: object) -> str:
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line]
        return line

    return call


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    """A folder with the results of a comparison."""
    document = sample()
    document["protocol"]["calibration"]["tokens"] = {}
    write_outputs(document, tmp_path / "compared")
    return tmp_path / "compared"


def test_what_is_written_begins_as_it_says(compared: Path) -> None:
    assert (compared / "report.html").read_text().startswith(PAGE_BEGINS)
    for suffix, begins in TABLE_BEGINS.items():
        assert (compared / f"table{suffix}").read_text().startswith(begins)
    check_outputs(compared)  # a comparison goes on in its own folder


@pytest.mark.parametrize("name", ["comparison.json", "table.md", "table.csv", "table.json", "report.html"])
def test_a_comparison_keeps_foreign_files_of_its_names(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=f"{name}' exists and is something else"):
        check_outputs(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "result.json", "config.json"])
def test_a_report_replaces_no_weights_and_no_record(name: str, compared: Path, tmp_path: Path, refused) -> None:
    folder = save_pruned(tmp_path / "pruned", shapes=FREE[:2])
    (folder / "result.json").write_text("{}")
    before = content_of(folder)
    assert "is something else" in refused("report", compared, "-o", folder / name)
    assert "is something else" in refused("report", compared, "-o", tmp_path / "new.html", "--table", folder / name)
    assert content_of(folder) == before and not (tmp_path / "new.html").exists()
    assert "is something else" in refused("report", compared, "-o", compared / "comparison.json")
    assert "is something else" in refused(
        "report", compared, "-o", tmp_path / "n", "--table", compared / "comparison.json"
    )


def test_a_report_replaces_a_report(compared: Path, tmp_path: Path) -> None:
    arguments = ["report", str(compared), "-o", str(tmp_path / "page.html"), "--table", str(tmp_path / "table.csv")]
    assert main(arguments) == main(arguments) == 0


@pytest.mark.parametrize("name", [".", ""])
def test_a_report_is_no_folder(name: str, compared: Path, refused) -> None:
    assert "is a folder; give the name of a file" in refused("report", compared, "-o", name)


def test_an_export_over_the_folder_of_its_input_is_refused(tmp_path: Path, refused) -> None:
    folder = save_pruned(tmp_path / "models" / "pruned", shapes=FREE[:2])
    before = content_of(tmp_path)
    line = refused("export", folder, "--to", "padded", "-o", tmp_path / "models", "--overwrite")
    assert "would replace the checkpoint" in line and content_of(tmp_path) == before


def test_an_export_replaces_no_gguf_of_a_dense_model(tmp_path: Path, refused) -> None:
    folder = save_pruned(tmp_path / "pruned", shapes=FREE[:2])
    dense = tmp_path / "dense.gguf"
    dense.write_bytes(b"GGUF" + bytes(20) + b"general.architecture" + bytes(12) + b"llama" + bytes(1000))
    before = dense.read_bytes()
    assert MARK.encode() not in before
    assert "is not a GGUF file of a pruned model" in refused(
        "export", folder, "--to", "gguf", "-o", dense, "--overwrite"
    )
    assert dense.read_bytes() == before


@pytest.mark.parametrize("name", ["calibration.txt", "recipe.yaml", "config.json", "checkpoint/model.safetensors"])
@pytest.mark.parametrize("begun", [False, True])
def test_what_lies_in_the_work_folder_is_kept(begun: bool, name: str, tiny_folder: Folder, tmp_path: Path) -> None:
    folder, out = tiny_folder("llama"), tmp_path / "out"
    if begun:
        with pytest.raises(KeyboardInterrupt):
            prune(folder, out, progress=StopAt("layers", 0))
        if name.startswith("checkpoint/"):
            return  # there a run writes its own
    foreign = tmp_path / "out.partial" / name
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_text("mine")
    with pytest.raises(OutputError, match=f"out.partial' holds '{name}', which intraslice has not written"):
        prune(folder, out, overwrite=True)
    assert foreign.read_text() == "mine"
    if begun:
        prune(folder, out, resume=True)
        assert content_of(tmp_path / "out.partial") == {name: b"mine"}


def test_a_second_run_waits_for_the_first(tiny_folder: Folder, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    partial.mkdir()
    with FileLock(partial / ".lock"):
        for how in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match="another run is working in"):
                prune(tiny_folder("llama"), out, **how)
    prune(tiny_folder("llama"), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_pruned_model_lists_its_files(tiny_folder: Folder, tmp_path: Path) -> None:
    prune(tiny_folder("llama"), tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "intraslice_files.json").read_text())["files"]
    assert {*listed, "intraslice_files.json"} == content_of(tmp_path / "out").keys()
    (tmp_path / "out" / "database.db").write_text("mine")
    with pytest.raises(OutputError, match=r"holds 'database\.db'"):
        prune(tiny_folder("llama"), tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("command", ["prune", "inspect", "eval", "bench", "export", "report"])
def test_names_that_no_file_can_have(command: str, tmp_path: Path, refused) -> None:
    options = {"prune": ["--sparsity", "0.3"], "export": ["--to", "padded"]}.get(command, [])
    output = ["-o", tmp_path / "out"] if command in ("prune", "export", "report") else []
    line = refused(command, "~no-such-user-here/model", *output, *options)
    assert "no home folder for '~no-such-user-here'" in line
    assert "is not UTF-8 text" in refused(command, os.fsdecode(b"caf\xe9"), *output, *options)
    if output:
        assert "is not UTF-8 text" in refused(command, "model", "-o", os.fsdecode(b"out\xff"), *options)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_loop_of_links(tiny_folder: Folder, tmp_path: Path, refused) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "leads nowhere" in refused("prune", tiny_folder("llama"), "-o", loop, "--sparsity", "0.3")
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]
