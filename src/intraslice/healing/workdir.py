"""The work folder of a healing: the last state of the training, the best weights, the curve."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from intraslice.engine.rundir import check_identity, flatten
from intraslice.errors import CheckpointError, IntraSliceError, OutputError, ResumeMismatchError
from intraslice.files import write_text
from intraslice.results.healing import CurvePoint

_MANIFEST = "manifest.json"


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

    Args:
        output: the final folder.
        identity: everything that decides the result; a resumed run must have the same.
        resume: go on with an interrupted run when there is one.
        overwrite: drop an interrupted run.

    Raises:
        OutputError: an interrupted run is there and neither resume nor overwrite was asked for.
        ResumeMismatchError: the interrupted run had another identity.
        CheckpointError: what it has left cannot be read.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.path = output.with_name(output.name + ".partial")
        self.staging = self.path / "checkpoint"
        self._identity: dict[str, Any] = json.loads(json.dumps(flatten(identity)))
        self.step = 0
        self.steps: int | None = None
        self.text = ""
        self.curve: list[CurvePoint] = []
        manifest = self.path / _MANIFEST
        if manifest.exists() and resume:
            self._load(manifest)
        elif self.path.exists() and any(self.path.iterdir()):
            if not overwrite:
                raise OutputError(
                    f"an interrupted run is in {str(self.path)!r}; pass --resume to continue it, or --overwrite "
                    "to start again."
                )
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.staging, ignore_errors=True)
        self._clean()
        self._save()

    def __enter__(self) -> HealDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave nothing behind when the run was refused before anything worth keeping was finished."""
        if kind is not None and issubclass(kind, IntraSliceError) and not self.step:
            self.remove()

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
        self._save()
        self._clean()

    def remove(self) -> None:
        """Delete the work folder."""
        shutil.rmtree(self.path)

    def _clean(self) -> None:
        kept = {self.state_path, *([self.best_path(self.best.step)] if self.curve else [])}
        for path in [*self.path.glob("checkpoint-*"), *self.path.glob("best-*.safetensors")]:
            if path not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _save(self) -> None:
        # Before the first state is saved, a resumed run begins anew; so nothing was measured then.
        curve = [asdict(point) for point in self.curve] if self.step else []
        data = {
            "identity": self._identity,
            "step": self.step,
            "steps": self.steps,
            "text": self.text,
            "curve": curve,
        }
        write_text(self.path / _MANIFEST, json.dumps(data, indent=1))

    def _load(self, manifest: Path) -> None:
        try:
            data = json.loads(manifest.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{manifest} is not readable ({error}); pass --overwrite to start again.") from error
        check_identity(data["identity"], self._identity, self.path)
        self.step, self.steps, self.text = data["step"], data["steps"], data["text"]
        self.curve = [CurvePoint(**point) for point in data["curve"]]
