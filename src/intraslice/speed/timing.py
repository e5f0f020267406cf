"""Repeated measurements in one line: the median, and how far they are spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The middle half of repeated measurements.

    Attributes:
        median: of all of them.
        low, high: first and third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize one or more measurements."""
        # Quartiles of a single value are not defined; of the same value twice they are that value.
        low, median, high = statistics.quantiles([*values, *values] if len(values) == 1 else values, method="inclusive")
        return cls(median, low, high)

    @property
    def relative(self) -> float:
        """Half the interquartile range over the median."""
        return (self.high - self.low) / (2 * self.median)
