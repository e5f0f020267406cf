"""SliceGPT follows from the sparsity alone: it has no options. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SliceGptOptions:
    """No options."""

    def read(self) -> set[str]:
        """Return the names of the options that have an effect: none."""
        return set()

    def contradiction(self, method: str, target: str) -> str | None:
        """Return None: there is nothing to contradict."""
        return None

    def fitted(self, *, target: str, hidden_size: int, norms_first: bool, one_shape: bool) -> SliceGptOptions:
        """Return the options as they are."""
        return self
