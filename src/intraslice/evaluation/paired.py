"""Two models on the same questions: the difference of their accuracies, and how sure it is. No torch.

A question that both answer alike says nothing about the difference, so its standard error is far below what the two
accuracies by themselves suggest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An accuracy minus that of the dense model, on the same questions.

    Attributes:
        difference: mean over the questions.
        stderr: its standard error; None for a single question.
    """

    difference: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Differences on several tasks.

    Attributes:
        tasks: by name.
        average: plain mean over the tasks; its standard error takes the tasks as independent.
    """

    tasks: dict[str, Difference]
    average: Difference

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def difference(answers: str, dense: str) -> Difference:
    """Compare right ("1") and wrong ("0") answers to the same questions.

    Args:
        answers: of the model, one sign for each question.
        dense: of the dense model.
    """
    gains = [int(own) - int(other) for own, other in zip(answers, dense, strict=True)]
    mean = sum(gains) / len(gains)
    if len(gains) < 2:
        return Difference(difference=mean, stderr=None)
    variance = sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1)
    return Difference(difference=mean, stderr=math.sqrt(variance / len(gains)))


def differences(answers: Mapping[str, str | None], dense: Mapping[str, str | None]) -> Differences | None:
    """Compare the answers to several tasks.

    Args:
        answers: of the model, by task; None where single answers are not known.
        dense: of the dense model.

    Returns:
        None unless all tasks can be compared.
    """
    found: dict[str, Difference] = {}
    for name, own in answers.items():
        other = dense.get(name)
        if own is None or other is None or len(own) != len(other) or not own:
            return None
        found[name] = difference(own, other)
    if not found:
        return None
    errors = [one.stderr for one in found.values()]
    known = [error for error in errors if error is not None]
    return Differences(
        tasks=found,
        average=Difference(
            difference=sum(one.difference for one in found.values()) / len(found),
            stderr=math.hypot(*known) / len(found) if len(known) == len(errors) else None,
        ),
    )
