"""From what the user calls a model to an opened checkpoint."""

from __future__ import annotations

from pathlib import Path

from intraslice.checkpoint.reader import Checkpoint, open_folder
from intraslice.errors import CheckpointError
from intraslice.progress import Progress, SilentProgress


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Find a dense model and open it.

    Args:
        model: hub id, local folder, GGUF file, or the built-in name "smollm2-135m".
        revision: branch, tag or commit of a hub model.
        trust_remote_code: whether code of the model's tokenizer may run.
        progress: where downloads and conversions report themselves.

    Raises:
        CheckpointError: the model cannot be found or read.
        UnsupportedModelError: it is not a model that can be pruned.
    """
    folder = resolve_model(model, revision=revision, progress=progress)
    return open_folder(folder, name=model, trust_remote_code=trust_remote_code)


def resolve_model(model: str, *, revision: str | None = None, progress: Progress | None = None) -> Path:
    """Return the local folder of a model."""
    progress = progress or SilentProgress()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    raise CheckpointError(f"{model!r} is not a folder")
