"""A cell is measured again when the code that made it has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from intraslice.cli.app import main
from intraslice.comparison import cells
from intraslice.comparison.code import code_digest
from support.small_comparison import INTRASLICE


def test_cells_of_other_code_are_measured_again(finished, small, jobs, monkeypatch):
    file = str(small(sparsities=[0.2], methods=[INTRASLICE]))
    monkeypatch.setattr(cells, "code_digest", lambda: "other")
    assert main(["compare", file, "-o", str(finished)]) == 0
    assert [job["job"] for job in jobs] == ["identify", "measure", "prune", "measure"]
    # What was measured before stays, and is found again by the code that measured it.
    jobs.clear()
    monkeypatch.setattr(cells, "code_digest", code_digest)
    assert main(["compare", file, "-o", str(finished)]) == 0
    assert [job["job"] for job in jobs] == ["identify"]


def package(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_the_digest_is_of_names_and_texts_and_not_of_places(tmp_path):
    first = package(tmp_path / "a", algebra__linalg="x = 1\n", api="y = 2\n")
    same = package(tmp_path / "b", api="y = 2\n", algebra__linalg="x = 1\n")
    assert code_digest(first) == code_digest(same)
    others = [
        package(tmp_path / "c", algebra__linalg="x = 2\n", api="y = 2\n"),
        package(tmp_path / "d", algebra__norms="x = 1\n", api="y = 2\n"),
        package(tmp_path / "e", algebra__linalg="x = 1\n", api="y = 2\n", more=""),
    ]
    assert len({code_digest(folder) for folder in (first, *others)}) == 4


@pytest.mark.parametrize("room", ["cli", "report"])
def test_code_that_only_shows_numbers_does_not_count(room, tmp_path):
    plain = package(tmp_path / "a", api="y = 2\n")
    shown = package(tmp_path / "b", **{"api": "y = 2\n", f"{room}__page": "z = 3\n"})
    assert code_digest(plain) == code_digest(shown)
