r"""The name of a calibration text: one source, or several with weights. No torch.

A mixture is written `a:0.5,b:0.25,c:0.25`. What stands after the last colon of a part is its weight if it is a number,
so a path like `C:\notes.txt` may have one or not. A comma always separates parts, unless the whole is one existing
file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from intraslice.data.text import NAMED_TEXTS, SAMPLED, check_text
from intraslice.errors import CalibrationError
from intraslice.names import expanded
from intraslice.options import DEFAULT_CALIBRATION


@dataclass(frozen=True)
class Part:
    """One source of a calibration text.

    Attributes:
        source: a name or a path.
        weight: its share of the sequences; those of all parts add up to 1.
    """

    source: str
    weight: float


MIXTURES = {
    "offline-mix": "self:0.5,readmes:0.15,docstrings:0.1,manual:0.15,code:0.1",
    "hub-mix": "fineweb-edu:0.4,ultrachat:0.2,codeparrot:0.2,finemath:0.2",
}
"""Mixtures with a name."""

CALIBRATION_HELP = (
    f"Text that the model is shown (default: {DEFAULT_CALIBRATION}). Best is text like what it will be used for: "
    "a .txt, .jsonl or .parquet file. Without a network: self (written by the model: a bit of everything it knows; "
    "takes minutes), builtin and manual (a manual of Python, the second without the part to judge on), docstrings "
    "(technical prose), readmes (prose about software), code (Python), offline-mix (of all these). With one: "
    "wikitext2, c4, fineweb-edu (prose), ptb (news), alpaca (instructions), ultrachat (conversations), codeparrot "
    "(Python), finemath (mathematics), hub-mix (prose, conversations, code and mathematics). "
    "Several with weights: self:0.5,notes.txt:0.5."
)
"""What each source is good for, in the help of the commands."""


def parse_source(source: str) -> list[Part]:
    """Return the parts of a source, mixtures with a name spelled out, the same source only once; reads nothing.

    Raises:
        CalibrationError: the weights make no sense.
    """
    weights: dict[str, float] = {}
    for name, weight in _split(source):
        inner = parse_source(MIXTURES[name]) if name in MIXTURES else [Part(name, 1.0)]
        for part in inner:
            weights[part.source] = weights.get(part.source, 0.0) + weight * part.weight
    return [Part(name, weight) for name, weight in weights.items()]


def is_sampled(source: str) -> bool:
    """Say whether a part of the source is sampled from the model."""
    return any(part.source in SAMPLED for part in parse_source(source))


def check_source(source: str) -> None:
    """Refuse an unknown name, a missing file or a weight that makes no sense, without reading anything.

    Raises:
        CalibrationError: with the reason.
    """
    for name, _ in _split(source):
        if name not in MIXTURES:
            check_text(name, (*MIXTURES, *NAMED_TEXTS))


def map_parts(source: str, change: Callable[[str], str]) -> str:
    """Return a source with another spelling of its parts, for example paths without folders."""
    parts = _written(source)
    if len(parts) == 1:
        return change(parts[0][0]) + (f":{parts[0][1]}" if parts[0][1] is not None else "")
    return ",".join(change(name) + ("" if weight is None else f":{weight}") for name, weight in parts)


def short_source(source: str) -> str:
    """Return a source without the folders of this machine."""
    return map_parts(source, lambda name: Path(name).name)


def share_out(parts: Sequence[Part], num_samples: int) -> list[int]:
    """Return how many sequences each part gives: in proportion to the weights, what is left by largest remainder."""
    exact = [part.weight * num_samples for part in parts]
    counts = [math.floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: num_samples - sum(counts)]:
        counts[index] += 1
    return counts


def _written(source: str) -> list[tuple[str, str | None]]:
    """Return the names of the parts with their weights as they are written, None where there is none."""
    if expanded(source).is_file():
        return [(source, None)]
    parts: list[tuple[str, str | None]] = []
    for text in source.split(","):
        name, colon, weight = text.strip().rpartition(":")
        parts.append((name.strip(), weight.strip()) if colon and name and _is_number(weight) else (text.strip(), None))
    return parts


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _split(source: str) -> list[tuple[str, float]]:
    """Return names and normalised weights."""
    parts = _written(source)
    if len(parts) > 1 and not all(name for name, _ in parts):
        raise CalibrationError(
            f"the mixture {source!r} has an empty part; write it as a:0.5,b:0.5, and mind that a path with a comma "
            "cannot be a part of a mixture"
        )
    names = [name for name, _ in parts]
    for name in names:
        if names.count(name) > 1:
            raise CalibrationError(f"the mixture {source!r} names {name!r} twice; add up its weights")
    without = [name for name, weight in parts if weight is None]
    if without and len(without) < len(parts):
        raise CalibrationError(
            f"the mixture {source!r} gives no weight to {without[0]!r}; give one to all parts, or to none"
        )
    weights = [1.0 if weight is None else float(weight) for _, weight in parts]
    for name, weight in zip(names, weights, strict=True):
        if not (0 < weight < math.inf):
            raise CalibrationError(f"the weight of {name!r} in {source!r} is {weight:g}; weights are above 0")
    total = sum(weights)
    return [(name, weight / total) for name, weight in zip(names, weights, strict=True)]
