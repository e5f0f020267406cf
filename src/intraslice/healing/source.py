"""Who learns from whom: student and teacher are opened and compared before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from intraslice.checkpoint.folder import StoredTensor, read_headers
from intraslice.checkpoint.ownership import check_intact
from intraslice.checkpoint.reader import Checkpoint
from intraslice.checkpoint.source import open_checkpoint
from intraslice.checkpoint.tensorfile import DTYPES
from intraslice.checkpoint.tokenizer import open_tokenizer
from intraslice.digests import file_digest
from intraslice.errors import CheckpointError, RecipeError, UnsupportedModelError, one_line
from intraslice.inspection import family_of
from intraslice.loading import load_config
from intraslice.names import expanded
from intraslice.progress import Progress
from intraslice.results.result import RESULT_FILE, PruneResult


@dataclass(frozen=True, kw_only=True)
class Student:
    """A pruned checkpoint folder, or a stock one that was exported from it.

    Attributes:
        name: as the user gave it.
        folder: where it lies.
        config: its config.
        tensors: where its weights lie, by name.
        result: its result.json; None for a folder without one.
    """

    name: str
    folder: Path
    config: Any
    tensors: dict[str, StoredTensor]
    result: PruneResult | None
    _files: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of most of the stored numbers."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_elements
        return DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]

    def identity(self) -> dict[str, dict[str, str]]:
        """Return the digests of all files that are read or copied, by name, as "files"."""
        if not self._files:
            self._files.update(self._read_digests())
        return {"files": dict(self._files)}

    def _read_digests(self) -> dict[str, str]:
        paths = {path for path in self.folder.iterdir() if path.is_file()}
        try:
            return {path.name: file_digest(path) for path in sorted(paths)}
        except OSError as error:
            raise CheckpointError(f"{self.name!r} cannot be read: {one_line(error)}") from error

    def check_unchanged(self) -> None:
        """Read everything again, and refuse to go on if anything has changed since `identity`.

        Raises:
            CheckpointError: with the first file that has.
        """
        before, now = self.identity()["files"], self._read_digests()
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise CheckpointError(
                    f"{name!r} of {self.name!r} has changed while it was in use; put it back, and repeat the command "
                    "with --resume."
                )


def open_student(name: str) -> Student:
    """Open the folder that is to be healed.

    Raises:
        CheckpointError: it is not there or not what was written.
        UnsupportedModelError: its architecture is not one of ours.
    """
    folder = expanded(name)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name!r} is not a checkpoint folder; give the output folder of 'intraslice prune'.")
    check_intact(folder, name)
    config = load_config(name)
    family_of(config)
    return Student(
        name=name, folder=folder, config=config, tensors=read_headers(folder, name), result=_result(folder, name)
    )


def _result(folder: Path, name: str) -> PruneResult | None:
    if not (folder / RESULT_FILE).is_file():
        return None
    try:
        return PruneResult.load(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; prune again, or delete that file and name the dense model with --teacher."
        ) from error


def open_teacher(
    student: Student, teacher: str | None, *, revision: str | None, trust_remote_code: bool, progress: Progress
) -> Checkpoint:
    """Open the dense model: the one that is named, or the one that the student was pruned from.

    Raises:
        CheckpointError: it cannot be found, or has another vocabulary.
        UnsupportedModelError: it is pruned, or of another family.
        RecipeError: nothing says which model it is.
    """
    if teacher is not None:
        config = load_config(teacher, revision=revision, trust_remote_code=trust_remote_code)
        if vars(config).get("intraslice") is not None:
            raise UnsupportedModelError(f"teacher {teacher!r} is itself pruned; name the dense model.")
        opened = open_checkpoint(teacher, revision=revision, trust_remote_code=trust_remote_code, progress=progress)
    elif student.result is None:
        raise RecipeError(f"{student.name!r} has no {RESULT_FILE} that names its dense model; name it with --teacher.")
    else:
        opened = _open_dense(student, student.result, revision, trust_remote_code, progress)
    _check_pair(student, opened)
    return opened


def _open_dense(
    student: Student, result: PruneResult, revision: str | None, trust_remote_code: bool, progress: Progress
) -> Checkpoint:
    try:
        return open_checkpoint(
            result.model,
            revision=revision or result.recipe.get("revision"),
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    except CheckpointError as error:
        raise CheckpointError(
            f"{student.name!r} was pruned from {result.model!r}, which cannot be opened ({str(error).rstrip('.')}); "
            "name the dense model with --teacher."
        ) from error


def _check_pair(student: Student, teacher: Checkpoint) -> None:
    family = family_of(student.config).name
    # A stock export may use the class of another family that computes the same.
    if family not in (teacher.spec.name, teacher.spec.stand_in):
        raise UnsupportedModelError(
            f"teacher {teacher.name!r} is of the family {teacher.spec.name}, and {student.name!r} of {family}; name "
            "the dense model that it was pruned from."
        )
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    if ours != theirs:
        raise CheckpointError(
            f"teacher {teacher.name!r} has a vocabulary of {theirs} tokens, and {student.name!r} one of {ours}; name "
            "the dense model that it was pruned from."
        )
    numbers = teacher.load_tokenizer().get_vocab()
    own = open_tokenizer(student.folder, student.name, student.config).get_vocab()
    # A class of tokenizers may add tokens of its own behind those of the files.
    if any(numbers.get(token, number) != number for token, number in own.items()):
        raise CheckpointError(
            f"the tokenizers of teacher {teacher.name!r} and of {student.name!r} give other numbers to the same "
            "tokens; name the dense model that it was pruned from."
        )


def check_hidden_states(student: Student, teacher: Checkpoint) -> None:
    """Refuse the loss of hidden states where these cannot be compared.

    Raises:
        RecipeError: the models have other numbers of layers, or streams of other widths.
    """
    for size in ("num_hidden_layers", "hidden_size"):
        ours, theirs = getattr(student.config, size), getattr(teacher.config, size)
        if ours != theirs:
            raise RecipeError(
                f"hidden states of {student.name!r} cannot be compared with those of the teacher: {size} is {ours} "
                f"and {theirs}; leave hidden_weight out."
            )


def config_with_dtype(config_file: Path, dtype: str) -> str:
    """Return the text of a config.json with another dtype of the weights.

    Args:
        config_file: of the student.
        dtype: its name.
    """
    data = json.loads(config_file.read_text(encoding="utf-8"))
    return json.dumps({**data, "dtype": dtype}, indent=2, sort_keys=True) + "\n"
