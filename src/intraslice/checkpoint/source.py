"""From what the user calls a model to an opened checkpoint: folder, GGUF file, built-in name or hub id."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import errors as hub_errors

from intraslice.checkpoint.folder import check_architecture
from intraslice.checkpoint.reader import Checkpoint, open_folder
from intraslice.checkpoint.writer import SIDE_PATTERNS
from intraslice.errors import CheckpointError, nearest, one_line
from intraslice.names import BUILT_IN, NameKind, expanded, kind_of
from intraslice.progress import Progress, SilentProgress

_HUB_PATTERNS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *SIDE_PATTERNS,
)


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Find a dense model and open it.

    Args:
        model: local folder, GGUF file, the built-in name "smollm2-135m", or hub id; in this order.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: whether code of the model's tokenizer may run; the model's own code never runs.
        progress: where downloads and conversions report themselves.

    Raises:
        CheckpointError: the model cannot be found or read.
        UnsupportedModelError: it is not a model that can be pruned.
        MissingExtraError: the package that reads GGUF files is not installed.
    """
    folder = resolve_model(model, revision=revision, dense_only=True, progress=progress)
    return open_folder(folder, name=model, trust_remote_code=trust_remote_code)


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    dense_only: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Return the local folder of a dense or pruned model, after a download or a conversion where needed.

    Args:
        model: local folder, GGUF file, the built-in name "smollm2-135m", or hub id; in this order.
        revision: branch, tag or commit of a hub model.
        dense_only: refuse a hub model that cannot be pruned before its weights are downloaded.
        progress: where downloads and conversions report themselves.

    Raises:
        CheckpointError: the model cannot be found or read.
        UnsupportedModelError: with `dense_only`, it is not a model that can be pruned.
        MissingExtraError: the package that reads GGUF files is not installed.
    """
    from intraslice.checkpoint.gguf import convert_gguf

    progress = progress or SilentProgress()
    path = expanded(model)
    match kind_of(model):
        case NameKind.FOLDER:
            return path
        case NameKind.FILE if path.suffix.lower() == ".gguf":
            return convert_gguf(path, name=model, progress=progress)
        case NameKind.BUILT_IN:
            return convert_gguf(find_built_in(model), name=model, progress=progress)
        case NameKind.HUB:
            return _download(model, revision, dense_only, progress)
        case kind:
            raise CheckpointError(_missing(model, kind))


def config_folder(model: str, revision: str | None) -> Path:
    """Return the folder of config.json of a hub model; nothing else is downloaded.

    Raises:
        CheckpointError: there is no such model, or it was the name of a file or folder that is not there.
    """
    kind = kind_of(model)
    if kind is not NameKind.HUB:
        raise CheckpointError(_missing(model, kind))
    with _hub_errors(model, revision):
        return _config_of_hub(model, revision).parent


def _missing(model: str, kind: NameKind) -> str:
    if kind is NameKind.FILE:
        return f"{model!r} is a file; give the folder it lies in, or a .gguf file"
    return f"there is no {'file' if kind is NameKind.MISSING_GGUF else 'folder or file'} {model!r}"


def find_built_in(name: str) -> Path:
    """Return the GGUF file of a built-in model, without importing the package that ships it.

    Raises:
        CheckpointError: the package is not installed, or holds no GGUF file.
    """
    package, install = BUILT_IN[name]
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise CheckpointError(f"the built-in model {name!r} needs a package that is not installed: {install}")
    return files[0]


def _download(model: str, revision: str | None, dense_only: bool, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(model, revision):
        # The config alone first: an unsupported model is refused before gigabytes are downloaded.
        config = _config_of_hub(model, revision)
        if dense_only:
            check_architecture(config.parent, model)
        progress.note(f"Fetching {_shown(model, revision)} from the Hugging Face hub (nothing is downloaded twice)")
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_HUB_PATTERNS)))


def _config_of_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, "config.json", revision=revision))


def _shown(model: str, revision: str | None) -> str:
    return f"{model!r}" + (f" at revision {revision!r}" if revision else "")


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Say what the hub answers in one sentence."""
    shown = _shown(model, revision)
    try:
        yield
    except hub_errors.GatedRepoError as error:
        raise CheckpointError(
            f"hub model {shown} asks for a licence agreement; accept it on its page and log in with 'hf auth login'"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise CheckpointError(f"hub model {model!r} has no revision {revision!r}") from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise CheckpointError(
            f"there is no folder, file or hub model {model!r}; a private model needs 'hf auth login'."
            + nearest(model, BUILT_IN)
        ) from error
    except hub_errors.RemoteEntryNotFoundError as error:
        raise CheckpointError(
            f"hub model {shown} has no config.json; of a GGUF repository download the .gguf file and give its path"
        ) from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{shown} is no local folder and not in the Hugging Face cache, and the hub cannot be reached; "
            f"give a local folder, a .gguf file or the built-in name 'smollm2-135m'." + nearest(model, BUILT_IN)
        ) from error
    except (hub_errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"fetching {shown} from the hub failed: {one_line(error)}") from error
