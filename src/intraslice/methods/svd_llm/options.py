"""The options of SVD-LLM. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from intraslice.methods.choices import option_values


@dataclass(frozen=True, kw_only=True)
class FactorOptions:
    """How a weight becomes two factors.

    Attributes:
        measured_on: the inputs that the factors of a weight fit: "dense_stream", those it has in the dense model (the
            published code), or "pruned_stream", those it has behind what is factored already (the better choice).
    """

    __pydantic_config__ = {"extra": "forbid"}

    measured_on: Literal["dense_stream", "pruned_stream"] = "dense_stream"


@dataclass(frozen=True, kw_only=True)
class SvdLlmOptions:
    """Everything besides the sparsity that decides the factors."""

    factors: FactorOptions = FactorOptions()

    def read(self) -> set[str]:
        """Return the names of the options that have an effect: all."""
        return set(option_values(self))

    def contradiction(self, method: str, target: str) -> str | None:
        """Return None: there is nothing to contradict."""
        return None

    def fitted(self, *, target: str, hidden_size: int, norms_first: bool, one_shape: bool) -> SvdLlmOptions:
        """Return the options as they are."""
        return self
