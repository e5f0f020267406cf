"""The work folder of a run: what is finished, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from intraslice.checkpoint.ownership import check_names, delete_ours
from intraslice.checkpoint.tensorfile import write_tensors
from intraslice.errors import CheckpointError, IntraSliceError, NumericalError, OutputError, ResumeMismatchError
from intraslice.files import write_text, writing
from intraslice.results.result import LayerRecord, layer_record_from_dict

_MANIFEST = "manifest.json"
_LOCK = ".lock"
# All that a run, whole or killed, leaves in its work folder.
_OURS = (
    *(_MANIFEST, _LOCK, f".{_MANIFEST}.tmp", "gradients.safetensors", ".gradients.safetensors.tmp", "*.bin"),
    *("layers/?????.safetensors", "layers/.?????.safetensors.tmp", "checkpoint/*"),
)


def flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one with dotted names, to say precisely which field differs."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def check_identity(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    """Refuse to go on with an interrupted run that has begun with other settings.

    Args:
        old: what decides the result of the interrupted run, flattened.
        new: the same of this one.
        path: the work folder.

    Raises:
        ResumeMismatchError: they differ.
    """
    differ = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    # A fingerprint says the least: it is named only when nothing else explains the difference.
    for name in sorted(differ, key=lambda name: name.endswith("fingerprint"))[:1]:
        raise ResumeMismatchError(
            f"the interrupted run in {str(path)!r} has {name} = {old.get(name)!r}, this one has "
            f"{new.get(name)!r}; repeat the first command with --resume, or pass --overwrite to start again."
        )


def interrupted_sparsity(output: Path) -> float | None:
    """Return the sparsity of the interrupted run beside `output`, or None when there is none that can be read."""
    try:
        identity = json.loads((_partial(output) / _MANIFEST).read_text())["identity"]
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return identity.get("method.sparsity")


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _is_ours(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _OURS)


class RunDir:
    """`<output>.partial`: the manifest, what the method keeps, one file per finished layer.

    The manifest is rewritten after each layer, by renaming, so a run killed at any moment leaves a valid one. A lock
    keeps a second run out, and only files that a run has written are ever deleted.

    Args:
        output: the final folder.
        identity: everything that decides the result; a resumed run must have the same.
        resume: go on with an interrupted run when there is one.
        overwrite: drop an interrupted run.

    Raises:
        OutputError: an interrupted run is there and neither resume nor overwrite was asked for; another run works in
            the folder, or it holds files that no run has written.
        ResumeMismatchError: the interrupted run had another identity.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.path = _partial(output)
        self.staging = self.path / "checkpoint"
        self._identity = json.loads(json.dumps(flatten(identity)))
        self.records: list[LayerRecord] = []
        self.carry: Any = None
        self.plan: dict[str, Any] | None = None
        self.seconds = 0.0
        self._lock = self._locked()
        try:
            self._start(resume=resume, overwrite=overwrite)
        except BaseException:
            self._lock.release()
            raise

    def _locked(self) -> FileLock:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / _LOCK)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise OutputError(
                    f"another run is working in {str(self.path)!r}; wait for it, or choose another output."
                ) from None
        return lock

    def _start(self, *, resume: bool, overwrite: bool) -> None:
        manifest = self.path / _MANIFEST
        if manifest.exists() and resume:
            self._load(manifest)
        elif any(path.name != _LOCK for path in self.path.iterdir()):
            if not overwrite:
                raise OutputError(
                    f"an interrupted run is in {str(self.path)!r}; pass --resume to continue it, or --overwrite "
                    "to start again."
                )
            # Without a manifest it is no run of ours, whatever the files are called.
            begun = manifest.exists()
            check_names(self.path, lambda name: _is_ours(name) if begun else name in (_LOCK, f".{_MANIFEST}.tmp"))
            delete_ours(self.path, lambda name: name != _LOCK)
        shutil.rmtree(self.staging, ignore_errors=True)
        self.save()

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
        self._lock.release()

    def _load(self, manifest: Path) -> None:
        try:
            data = json.loads(manifest.read_text())
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{manifest} is not readable ({error}); pass --overwrite to start again.") from error
        check_identity(data["identity"], self._identity, self.path)
        self.records = [layer_record_from_dict(record) for record in data["records"]]
        self.carry = data["carry"]
        self.seconds = data["seconds"]
        self.plan = data["plan"]

    def save(self) -> None:
        """Write the manifest."""
        data = {
            "identity": self._identity,
            "plan": self.plan,
            "records": [asdict(record) for record in self.records],
            "carry": self.carry,
            "seconds": self.seconds,
        }
        write_text(self.path / _MANIFEST, json.dumps(data, indent=1))

    def keep_plan(self, plan: dict[str, Any], seconds: float) -> None:
        """Store what is decided for all layers."""
        self.plan = plan
        self.seconds = seconds
        self.save()

    def layer_path(self, index: int) -> Path:
        """Return the file of one finished layer."""
        return self.path / "layers" / f"{index:05d}.safetensors"

    def commit(self, record: LayerRecord, tensors: dict[str, Tensor], carry: Any, seconds: float) -> None:
        """Store a finished layer: first its tensors, then the manifest that names it."""
        write_tensors(self.layer_path(record.layer), tensors)
        self.records.append(record)
        self.carry = carry
        self.seconds = seconds
        self.save()

    def remove(self) -> None:
        """Delete the work folder, but nothing that others put into it."""
        delete_ours(self.path, lambda name: _is_ours(name) and name != _LOCK)
        self._lock.release()
        (self.path / _LOCK).unlink(missing_ok=True)
        if not os.listdir(self.path):
            self.path.rmdir()
