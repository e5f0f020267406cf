"""What healing leaves behind to read: the `healing` record of result.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One measurement on the held-out text.

    Attributes:
        step: steps of the optimizer so far.
        tokens: trained on so far, repetitions counted.
        loss: mean training loss since the last measurement; None before the first step.
        kl: mean KL divergence from teacher to student on the held-out text, nats per token.
        seconds: of training so far, those of interrupted runs included.
    """

    step: int
    tokens: int
    loss: float | None
    kl: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class HealingRecord:
    """How a checkpoint was healed.

    Attributes:
        teacher: what was given as the dense model.
        checkpoint: what was healed.
        options: all settings.
        steps: of the optimizer that were planned.
        learning_rate: its peak.
        calibration: name, sequences to train on and held out, seqlen, seed, fingerprint.
        curve: the measurements, the first one before the first step.
        best_step: after how many steps the kept weights were best.
        stopped: why it ended before its budget, as a sentence; None if it did not.
        trained_parameters: how many numbers were trained.
        seconds: of training in all.
        tokens_per_second: trained, the measurements included.
        peak_memory_bytes: peak resident memory of the process (CPU), or of the accelerator when one was used.
        versions: of the libraries.
        device: where it ran.
        command: the command line, or the Python call.
        previous: the record of an earlier healing of the same weights.
    """

    teacher: str
    checkpoint: str
    options: dict[str, Any]
    steps: int
    learning_rate: float
    calibration: dict[str, Any]
    curve: tuple[CurvePoint, ...]
    best_step: int
    stopped: str | None
    trained_parameters: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    versions: dict[str, str]
    device: str
    command: str = ""
    previous: dict[str, Any] | None = None

    @property
    def kl_before(self) -> float:
        """Held-out divergence before the first step."""
        return self.curve[0].kl

    @property
    def best(self) -> CurvePoint:
        """The measurement of the weights that were kept."""
        return next(point for point in self.curve if point.step == self.best_step)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {**asdict(self), "curve": [asdict(point) for point in self.curve]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HealingRecord:
        """Inverse of `to_dict`."""
        return cls(**{**data, "curve": tuple(CurvePoint(**point) for point in data["curve"])})
