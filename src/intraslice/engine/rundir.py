"""The work folder of a prune: what is finished, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from intraslice.checkpoint.tensorfile import read_tensors, write_tensors
from intraslice.checkpoint.workfolder import MANIFEST, WorkFolder, work_path
from intraslice.errors import CheckpointError, IntraSliceError, NumericalError
from intraslice.results.result import LayerRecord, Tuned
from intraslice.runtime.families_intraslice import LayerShape

LAYERS, TUNED = "layers", "tuned"
"""Folders of finished layers: as they were left one by one, and as training them together has left them."""


class PruneState(BaseModel):
    """How far a prune is.

    Attributes:
        plan: what is decided for all layers; None before it is.
        records: of the finished layers, in their order.
        carry: what the method has to know of them.
        tuned: what training all layers together has changed; None before, and where nothing was trained.
        seconds: spent so far, by all runs together.
        threads: with which the run computes; another number may round differently.
    """

    model_config = ConfigDict(strict=True, extra="forbid", ser_json_inf_nan="constants")

    plan: dict[str, Any] | None
    records: list[LayerRecord]
    carry: Any
    tuned: Tuned | None = None
    seconds: float
    threads: int


def interrupted_sparsity(output: Path) -> float | None:
    """Return the sparsity of the interrupted run beside `output`, or None when there is none that can be read."""
    try:
        sparsity = json.loads((work_path(output) / MANIFEST).read_bytes())["identity"]["method.sparsity"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return sparsity if isinstance(sparsity, float) else None


class RunDir:
    """`<output>.partial`: the manifest, what the method keeps, one file per finished layer.

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
        self._folder = WorkFolder(output, "prune")
        self.path, self.staging = self._folder.path, self._folder.staging
        self.records: list[LayerRecord] = []
        self.carry: Any = None
        self.plan: dict[str, Any] | None = None
        self.tuned: Tuned | None = None
        self.seconds = 0.0
        self.threads = torch.get_num_threads()
        self._digests: dict[str, str] = {}
        try:
            state = self._folder.begin(PruneState, identity, resume=resume, overwrite=overwrite)
            if state is not None:
                self._go_on(state)
            self.save()
        except BaseException:
            self._folder.leave()
            raise

    def _go_on(self, state: PruneState) -> None:
        numbers = range(len(state.records))
        if [record.layer for record in state.records] != list(numbers):
            raise CheckpointError(
                f"the manifest of the interrupted run in {str(self.path)!r} does not list its layers in order; pass "
                "--overwrite to start again."
            )
        self.plan, self.records, self.carry, self.tuned = state.plan, state.records, state.carry, state.tuned
        self.seconds, self.threads = state.seconds, state.threads
        folders = dict.fromkeys((LAYERS, self._newest))
        self._digests = self._folder.digests([self._name(index, folder) for folder in folders for index in numbers])

    @property
    def _newest(self) -> str:
        """The folder of the layers as they are after the last training that has helped."""
        return TUNED if self.tuned is not None and self.tuned.step else LAYERS

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let others in, and leave nothing when the run was refused before anything worth keeping was finished."""
        finished = self.records or self.plan is not None or any(self.path.glob("*.safetensors"))
        # A resumed run would do the same and fail in the same way.
        if kind is not None and issubclass(kind, NumericalError):
            finished = False
        if kind is not None and issubclass(kind, IntraSliceError) and not finished:
            self.remove()
        else:
            self._folder.leave()

    def save(self) -> None:
        """Write the manifest."""
        state = PruneState(
            plan=self.plan,
            records=self.records,
            carry=self.carry,
            tuned=self.tuned,
            seconds=self.seconds,
            threads=self.threads,
        )
        self._folder.save(state, self._digests)

    def keep_plan(self, plan: dict[str, Any], seconds: float) -> None:
        """Store what is decided for all layers."""
        self.plan = plan
        self.seconds = seconds
        self.save()

    @staticmethod
    def _name(index: int, folder: str) -> str:
        return f"{folder}/{index:05d}.safetensors"

    def layer_path(self, index: int) -> Path:
        """Return the file of one finished layer.

        Raises:
            CheckpointError: it is not what was written.
        """
        return self._folder.check(self._name(index, self._newest))

    def layer_shape(self, index: int) -> LayerShape:
        """Return what a finished layer is now."""
        return self.records[index].shape

    def load_layer(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of one finished layer, by name within the layer.

        Raises:
            CheckpointError: they are not what was written.
        """
        return read_tensors(self.layer_path(index))

    def commit(self, record: LayerRecord, tensors: dict[str, Tensor], carry: Any, seconds: float) -> None:
        """Store a finished layer: first its tensors, then the manifest that names it."""
        name = self._name(record.layer, LAYERS)
        self._digests[name] = write_tensors(self.path / name, tensors)
        self.records.append(record)
        self.carry = carry
        self.seconds = seconds
        self.save()

    def replace_layers(self, layers: Iterable[dict[str, Tensor]]) -> None:
        """Store what training all layers together has made of them; `keep_tuned` puts them in the others' place."""
        for index, tensors in enumerate(layers):
            name = self._name(index, TUNED)
            self._digests[name] = write_tensors(self.path / name, tensors)

    def keep_tuned(self, tuned: Tuned, seconds: float) -> None:
        """Note that all layers were trained together."""
        self.tuned = tuned
        self.seconds = seconds
        self.save()

    def forget_layers(self) -> None:
        """Begin with the first layer again: the plan is all that is kept."""
        self.records, self.carry, self.tuned, self._digests = [], None, None, {}

    def publish(self, overwrite: bool) -> None:
        """Give the finished checkpoint its name.

        Raises:
            OutputError: the output exists and may not be replaced, or cannot be written.
        """
        self._folder.publish(overwrite)

    def remove(self) -> None:
        """Delete the work folder, but nothing that others put into it."""
        self._folder.remove()
