"""What makes a run the run that it is: a resumed one must agree in all of it, and the first difference is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from intraslice.errors import ResumeMismatchError


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
    if not differ:
        return
    # A digest says the least: it is named only when nothing else explains the difference.
    name = min(differ, key=lambda name: (name.endswith("fingerprint"), _file_of(name) is not None))
    again = "or pass --overwrite to start again."
    file = _file_of(name)
    if file is not None:
        raise ResumeMismatchError(
            f"{file} has changed since the run in {str(path)!r} was interrupted; put it back and repeat the command, "
            f"{again}"
        )
    raise ResumeMismatchError(
        f"the interrupted run in {str(path)!r} has {name} = {old.get(name)!r}, this one has {new.get(name)!r}; repeat "
        f"the first command with --resume, {again}"
    )


def _file_of(name: str) -> str | None:
    """Return what a field of an identity is the digest of, as words; None for one that says something itself."""
    for section, words in (("model", "the model"), ("checkpoint", "the checkpoint"), ("teacher", "the teacher")):
        for field, what in (("config", "the config"), ("weights", "a weight")):
            if name == f"{section}.{field}":
                return f"{what} of {words}"
        if name.startswith(f"{section}.files."):
            return f"{name.removeprefix(f'{section}.files.')!r} of {words}"
    return None
