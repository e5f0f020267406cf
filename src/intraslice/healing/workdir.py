"""The work folder of a healing: the last state of the training, the best weights, the curve."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from intraslice.checkpoint.config_file import CONFIG_FILE
from intraslice.checkpoint.tensorfile import read_tensors, write_tensors
from intraslice.checkpoint.workfolder import WorkFolder
from intraslice.digests import file_digest
from intraslice.errors import IntraSliceError, ResumeMismatchError
from intraslice.files import writing
from intraslice.results.healing import CurvePoint


class HealState(BaseModel):
    """How far a healing is.

    Attributes:
        step: steps of the optimizer that are saved.
        steps: of the whole training; None until it is decided.
        text: fingerprint of the sequences; "" until they are known.
        curve: the measurements up to the last saved step.
        threads: with which the run computes; another number may round differently.
    """

    model_config = ConfigDict(strict=True, extra="forbid", ser_json_inf_nan="constants")

    step: int
    steps: int | None
    text: str
    curve: list[CurvePoint]
    threads: int


class HealDir:
    """`<output>.partial` of a healing.

    The manifest is rewritten, by renaming, when all that it names is on the disk; so a run killed at any moment leaves
    a state to go on from.

    Attributes:
        path: the folder.
        staging: the finished checkpoint before it gets its name.
        step: steps of the optimizer that are saved.
        steps: of the whole training; None until it is decided.
        text: fingerprint of the sequences; "" until they are known.
        curve: the measurements up to the last step, saved or not.
        threads: with which the run computes.

    Args:
        output: the final folder.
        identity: everything that decides the result; a resumed run must have the same.
        resume: go on with an interrupted run when there is one.
        overwrite: drop an interrupted run.

    Raises:
        OutputError: an interrupted run is there and neither resume nor overwrite was asked for; another run works in
            the folder, or it holds files that no run has written.
        ResumeMismatchError: the interrupted run had another identity.
        CheckpointError: what it has left is damaged.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        self._folder = WorkFolder(output, "heal")
        self.path, self.staging = self._folder.path, self._folder.staging
        self.step = 0
        self.steps: int | None = None
        self.text = ""
        self.curve: list[CurvePoint] = []
        self.threads = torch.get_num_threads()
        self._digests: dict[str, str] = {}
        self._best: dict[str, str] = {}
        try:
            state = self._folder.begin(HealState, identity, resume=resume, overwrite=overwrite)
            if state is not None:
                self.step, self.steps, self.text = state.step, state.steps, state.text
                self.curve, self.threads = state.curve, state.threads
                if self.step:
                    best = self.best_path(self.best.step).name
                    self._best = self._folder.digests([best])
                    self._digests = {**self._folder.saved, **self._best}
            self._save()
            self._clean()
        except BaseException:
            self._folder.leave()
            raise

    def __enter__(self) -> HealDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave nothing behind when the run was refused before anything worth keeping was finished."""
        if kind is not None and issubclass(kind, IntraSliceError) and not self.step:
            self.remove()
        else:
            self._folder.leave()

    @property
    def state_path(self) -> Path:
        """Folder in which the Trainer has saved the last state."""
        return self.path / f"checkpoint-{self.step}"

    @property
    def best(self) -> CurvePoint:
        """The measurement with the smallest divergence; the first one counts, NaN does not."""
        return min(self.curve, key=lambda point: point.kl if point.kl == point.kl else float("inf"))

    def best_path(self, step: int) -> Path:
        """Return the file of the trained weights of a step."""
        return self.path / f"best-{step}.safetensors"

    def keep_best(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Store the trained weights of a step, which are the best so far."""
        path = self.best_path(step)
        self._best = {path.name: write_tensors(path, tensors)}

    def load_best(self) -> dict[str, Tensor]:
        """Return the best trained weights.

        Raises:
            CheckpointError: they are not what was written.
        """
        path = self.best_path(self.best.step)
        return read_tensors(self._folder.check_digest(path.name, self._best[path.name]))

    def settle(self, steps: int, text: str) -> None:
        """Store what was found out at the start; a resumed run must find out the same.

        Raises:
            ResumeMismatchError: the text is another one now.
        """
        if self.text and self.text != text:
            raise ResumeMismatchError(
                f"the interrupted run in {str(self.path)!r} was trained on other text; has the text file changed? Put "
                "it back, or pass --overwrite to start again."
            )
        self.steps, self.text = steps, text
        self._save()

    def commit(self, step: int) -> None:
        """Note that the state of a step is saved, and drop older ones."""
        self.step = step
        with writing(self.path):
            # The Trainer would read it back, for nothing but a version, as a config of no family; such a config does
            # not know the layers of GPT-2, which calls their number n_layer.
            (self.state_path / CONFIG_FILE).unlink(missing_ok=True)
            states = [path for path in sorted(self.state_path.rglob("*")) if path.is_file()]
            self._digests = {path.relative_to(self.path).as_posix(): file_digest(path) for path in states}
        self._digests |= self._best
        self._save()
        self._clean()

    def publish(self, overwrite: bool) -> None:
        """Give the finished checkpoint its name.

        Raises:
            OutputError: the output exists and may not be replaced, or cannot be written.
        """
        self._folder.publish(overwrite)

    def remove(self) -> None:
        """Delete the work folder, but nothing that others put into it."""
        self._folder.remove()

    def _clean(self) -> None:
        kept = {self.state_path, *([self.best_path(self.best.step)] if self.curve else [])}
        for path in [*self.path.glob("checkpoint-[0-9]*"), *self.path.glob("best-[0-9]*.safetensors")]:
            if path not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _save(self) -> None:
        # Before the first state is saved, a resumed run begins anew; so nothing was measured then.
        curve = list(self.curve) if self.step else []
        state = HealState(step=self.step, steps=self.steps, text=self.text, curve=curve, threads=self.threads)
        self._folder.save(state, self._digests)
