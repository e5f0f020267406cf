"""The folder beside an output in which the output is made: one process at a time, and whole or not at all.

A run that is killed at any moment leaves a folder that the next one understands. What decides that, in this order:

- The lock says whether somebody works here now.
- The manifest says what is finished and what the files of it hold. It is replaced by renaming, after the files that it
  names are on the disk. It comes before everything else in the folder and goes after everything else, so that files
  beside a manifest are ours and files without one are not.
- An output that is replaced is moved to `old` until the new one has its name. Whoever finds it there puts it back, or
  deletes it if the new one is in place.
- A published output names the run that made it. A work folder of the same run is a rest.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from intraslice.checkpoint.identity import check_identity, flatten
from intraslice.checkpoint.ownership import (
    CHECKPOINT_FILES,
    check_names,
    delete_ours,
    delete_published,
    matches,
    read_list,
)
from intraslice.checkpoint.writer import OLD, publish
from intraslice.digests import UNSEALED, file_digest, is_sealed, seal
from intraslice.errors import CheckpointError, OutputError, ResumeMismatchError, one_line
from intraslice.files import SHARED_TEMPORARY, write_text, writing

MANIFEST = "manifest.json"
LOCK = ".lock"
STAGING = "checkpoint"
GGUF_FILE = "model.gguf"
_UNFINISHED = f".{MANIFEST}.tmp"
_FORMAT = 1
# How manifests began that had no digest yet: they cannot be resumed, but they are ours.
_BEGINS = (b'{"written_by":"intraslice"', b'{\n "written_by": "intraslice"', b'{\n "identity": {')
# Two processes that end and begin at the same moment may take the folder from under each other's feet.
_ATTEMPTS = 20

# What runs of any kind put into their work folder, and into the ones inside of it.
_FOLDERS = (STAGING, "pruned", "healed")
_MEASURED = ("gradients", "divergences", "levels", "gates", "outputs")
_ONE_RUN = (
    *(MANIFEST, LOCK, _UNFINISHED, "hidden*.bin"),
    *(f"{name}.safetensors" for name in _MEASURED),
    *(f".{name}.safetensors{end}" for name in _MEASURED for end in (SHARED_TEMPORARY, ".tmp")),
    *("layers/?????.safetensors", "layers/.?????.safetensors.tmp", GGUF_FILE, "checkpoint-[0-9]*/*"),
    *("best-[0-9]*.safetensors", ".best-[0-9]*.safetensors.tmp"),
    *("levels/[0-9]*.safetensors", "levels/.[0-9]*.safetensors.tmp"),
    *("tuned/?????.safetensors", "tuned/.?????.safetensors.tmp", "tune/?????.bin"),
    *(f"{folder}/{name}" for folder in _FOLDERS for name in CHECKPOINT_FILES),
    *(f"{folder}/.{name}.tmp" for folder in _FOLDERS for name in CHECKPOINT_FILES),
)
RUN_FILES = (*_ONE_RUN, *(f"{inner}.partial/{name}" for inner in ("pruned", "healed") for name in _ONE_RUN))
"""Patterns of names relative to the work folder: what else lies there is not ours."""

State = TypeVar("State", bound=BaseModel)


class Manifest(BaseModel):
    """The content of manifest.json.

    Attributes:
        written_by: always "intraslice".
        xxh3_128: digest of the manifest itself.
        format: number of this form.
        kind: what is made, for example "prune".
        run: a random name, which the published folder has as well.
        identity: everything that decides the result, with dotted names.
        clean: whether what an older run has left in the folder is deleted.
        files: digest of each finished file, by its name relative to the folder.
        state: how far the run is; each kind of run has a schema of its own.
    """

    model_config = ConfigDict(strict=True, extra="forbid", ser_json_inf_nan="constants")

    written_by: Literal["intraslice"] = "intraslice"
    xxh3_128: str = UNSEALED
    format: Literal[1] = _FORMAT
    kind: str
    run: str
    identity: dict[str, Any]
    clean: bool
    files: dict[str, str]
    state: dict[str, Any]


def work_path(output: Path) -> Path:
    """Return the work folder of an output."""
    return output.with_name(output.name + ".partial")


class WorkFolder:
    """A work folder that this process has locked.

    Attributes:
        path: the folder.
        staging: where the finished output is put together.

    Args:
        output: what is made: a folder, or a file of the same file system.
        kind: what is made, for example "prune".
        path: the work folder; `work_path(output)` unless given.

    Raises:
        OutputError: another process works there, or the folder cannot be made.
    """

    def __init__(self, output: Path, kind: str, *, path: Path | None = None) -> None:
        self.path = path or work_path(output)
        self.staging = self.path / STAGING
        self._output = output
        self._kind = kind
        self._identity: dict[str, Any] = {}
        self._digests: dict[str, str] = {}
        self._run = secrets.token_hex(8)
        self._clean = False
        with writing(self.path):
            self._lock = self._locked()
        try:
            with writing(self.path):
                self._settle()
        except BaseException:
            self.leave()
            raise

    # One process at a time.

    def _locked(self) -> FileLock:
        for _ in range(_ATTEMPTS):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise OutputError(
                    f"another run is working in {str(self.path)!r}; wait for it, or choose another output."
                ) from None
            except FileNotFoundError:
                continue
            # The file that was locked may have been deleted meanwhile, by the process that had the lock before.
            if (self.path / LOCK).exists():
                return lock
            lock.release()
        raise OutputError(f"other runs come and go in {str(self.path)!r}; choose another output.")

    def leave(self) -> None:
        """Let others in; a run that has begun can go on later, and a folder without one is as it was before."""
        if self.begun:
            self._lock.release()
        else:
            self.remove()

    # What an earlier process has left.

    def _settle(self) -> None:
        """Finish what was interrupted between the renames and deletions of a publication."""
        old = self.path / OLD
        if os.path.lexists(old):
            if os.path.lexists(self._output):
                delete_published(old)
            else:
                os.replace(old, self._output)
        content = self._manifest_bytes()
        if content is None:
            return
        published = read_list(self._output)
        if published is not None and published.run and f'"run": "{published.run}"'.encode() in content:
            self._delete_files(keep_manifest=False)

    @property
    def is_bare(self) -> bool:
        """Whether there is nothing of a run in the folder."""
        return all(path.name in (LOCK, _UNFINISHED) for path in self.path.iterdir())

    @property
    def begun(self) -> bool:
        """Whether a run has begun here: its manifest is there, readable or not."""
        return self._manifest_bytes() is not None

    def _manifest_bytes(self) -> bytes | None:
        path = self.path / MANIFEST
        try:
            content = path.read_bytes() if path.is_file() else b""
        except OSError:
            return None
        # Somebody else's file of that name is no manifest.
        return content if content.startswith(_BEGINS) else None

    @staticmethod
    def _ours(name: str) -> bool:
        return matches(name, RUN_FILES)

    # Beginning and going on.

    def begin(self, state: type[State], identity: dict[str, Any], *, resume: bool, overwrite: bool) -> State | None:
        """Return how far the interrupted run is that goes on; None begins a new one in an empty folder.

        After None, `save` has to be called before any file is put into the folder.

        Args:
            state: what the manifest of such a run holds.
            identity: everything that decides the result, in sections; a resumed run must have the same.
            resume: go on with an interrupted run when there is one.
            overwrite: drop an interrupted run; beside `resume`, only one that cannot go on.

        Raises:
            OutputError: an interrupted run is there and neither resume nor overwrite was asked for, or the folder holds
                a file that no run has written.
            ResumeMismatchError: the interrupted run had another identity.
            CheckpointError: what it has left is damaged.
        """
        self._identity = json.loads(json.dumps(flatten(identity)))
        if self.is_bare:
            return None
        if not self.begun:
            # Without a manifest it is no run of ours, whatever the files are called.
            check_names(self.path, lambda name: name in (LOCK, _UNFINISHED))
        elif resume:
            try:
                return self._resumed(state)
            except (CheckpointError, ResumeMismatchError):
                if not overwrite:
                    raise
        elif not overwrite:
            raise OutputError(
                f"an interrupted run is in {str(self.path)!r}; pass --resume to continue it, or --overwrite to start "
                "again."
            )
        check_names(self.path, self._ours)
        return None

    def _resumed(self, state: type[State]) -> State | None:
        path = self.path / MANIFEST
        again = "pass --overwrite to start again."
        content = self._manifest_bytes() or b""
        if not is_sealed(content):
            raise CheckpointError(f"{str(path)!r} is damaged: it is not what was written; {again}")
        manifest = self._parsed(Manifest, content)
        if manifest.kind != self._kind:
            raise ResumeMismatchError(
                f"the interrupted run in {str(self.path)!r} is a {manifest.kind}, this one is a {self._kind}; repeat "
                f"the first command with --resume, or {again}"
            )
        check_identity(manifest.identity, self._identity, self.path)
        found = self._parsed(state, json.dumps(manifest.state).encode())
        for name in manifest.files:
            self.check_digest(name, manifest.files[name])
        self._run, self._digests = manifest.run, manifest.files
        if not manifest.clean:
            # Killed while it deleted what the run before had left.
            return None
        self.clear_staging()
        # What was being measured when the run was killed: nobody else writes here.
        for left in self.path.glob(f".*{SHARED_TEMPORARY}"):
            if self._ours(left.name):
                left.unlink()
        self._clean = True
        return found

    def _parsed(self, schema: type[State], content: bytes) -> State:
        try:
            return schema.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"][:4]))
            raise CheckpointError(
                f"{str(self.path / MANIFEST)!r} is damaged, or was written by another version of intraslice "
                f"({one_line(where + ': ' + first['msg'])[:150]}); pass --overwrite to start again."
            ) from None

    def clear_staging(self) -> None:
        """Delete an unfinished output.

        Raises:
            OutputError: with the first file that is not ours.
        """
        with writing(self.staging):
            if self.staging.is_dir() and not self.staging.is_symlink():
                check_names(self.staging, lambda name: self._ours(f"{STAGING}/{name}"))
                delete_ours(self.staging, lambda name: True)
                self.staging.rmdir()
            elif os.path.lexists(self.staging):
                check_names(self.path, lambda name: name != STAGING)

    # What is finished.

    @property
    def saved(self) -> dict[str, str]:
        """The digests of all finished files, as the manifest has them."""
        return dict(self._digests)

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """Return the digests of these finished files, from the manifest.

        Raises:
            CheckpointError: it does not have one of them.
        """
        for name in names:
            if name not in self._digests:
                raise CheckpointError(
                    f"the manifest of the interrupted run in {str(self.path)!r} has no digest of {name!r}; pass "
                    "--overwrite to start again."
                )
        return {name: self._digests[name] for name in names}

    def save(self, state: BaseModel, digests: dict[str, str]) -> None:
        """Write the manifest; the first time, delete what the run before has left.

        Args:
            state: how far the run is.
            digests: of each finished file, by its name relative to the folder.
        """
        self._digests = dict(digests)
        if not self._clean and self.begun:
            # The new manifest makes the rest ours to delete, and keeps a resumed run from using it.
            self._write(state)
            self._delete_files(keep_manifest=True)
        self._clean = True
        self._write(state)

    def _write(self, state: BaseModel) -> None:
        manifest = Manifest(
            kind=self._kind,
            run=self._run,
            identity=self._identity,
            clean=self._clean,
            files=self._digests,
            state=state.model_dump(mode="json"),
        )
        write_text(self.path / MANIFEST, seal(manifest.model_dump_json(indent=1)))

    def check(self, name: str) -> Path:
        """Return the path of a finished file.

        Raises:
            CheckpointError: it is not what was written.
        """
        return self.check_digest(name, self._digests[name])

    def check_digest(self, name: str, digest: str) -> Path:
        """Return the path of a file that was written with this digest, whether the manifest names it already or not.

        Raises:
            CheckpointError: it is not what was written.
        """
        path, reason = self.path / name, "it is not what was written"
        if not self._ours(name):
            reason = "no run gives its files such a name"
        else:
            try:
                if file_digest(path) == digest:
                    return path
            except OSError as error:
                reason = f"it cannot be read, {error.strerror or error}"
        raise CheckpointError(
            f"{name!r} of the interrupted run in {str(self.path)!r} is damaged ({reason}); pass --overwrite to start "
            "again."
        )

    # The end.

    def publish(self, overwrite: bool, folder: Path | None = None) -> None:
        """Give the finished output its name; what it replaces is deleted when the new one is in place.

        Args:
            overwrite: replace an existing output.
            folder: the finished output; `staging` unless given.

        Raises:
            OutputError: the output exists and may not be replaced, or a rename fails.
        """
        publish(folder or self.staging, self._output, overwrite, attic=self.path / OLD, run=self._run)

    def remove(self) -> None:
        """Delete the work folder, but nothing that others put into it, and let others in."""
        if not self._lock.is_locked:
            return
        with writing(self.path):
            self._delete_files(keep_manifest=False)
            if os.name != "nt":
                # While it is locked: whoever waits for this file finds out that it is gone.
                (self.path / LOCK).unlink(missing_ok=True)
            self._lock.release()
            if os.name == "nt":
                (self.path / LOCK).unlink(missing_ok=True)
            try:
                self.path.rmdir()
            except OSError:
                # Somebody else's files, or the next run.
                pass

    def _delete_files(self, *, keep_manifest: bool) -> None:
        if not self.begun:
            (self.path / _UNFINISHED).unlink(missing_ok=True)
            return
        kept = (LOCK, MANIFEST) if keep_manifest else (LOCK,)
        old = self.path / OLD
        if os.path.lexists(old):
            delete_published(old)
        delete_ours(self.path, lambda name: self._ours(name) and name not in kept, last=MANIFEST)


def settle(output: Path) -> None:
    """Finish the publication of an output if a process was killed in the middle of it; else nothing changes.

    Raises:
        OutputError: another process works there.
    """
    if work_path(output).is_dir():
        WorkFolder(output, "").leave()


@contextmanager
def staged_output(output: Path, kind: str) -> Iterator[WorkFolder]:
    """Yield a hidden work folder, emptied of what a killed process has left; afterwards nothing remains of it.

    Args:
        output: what is made; the block publishes it.
        kind: what is made, for example "export".

    Raises:
        OutputError: another process works on the same output, or the folder cannot be written.
    """
    work = WorkFolder(output, kind, path=output.with_name(f".{output.absolute().name}.partial"))
    try:
        work.begin(Nothing, {}, resume=False, overwrite=True)
        work.save(Nothing(), {})
        with writing(work.staging):
            work.staging.mkdir()
        yield work
    finally:
        work.remove()


class Nothing(BaseModel):
    """The state of a run that is never resumed."""
