"""What a window of text begins with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from intraslice.runtime.families_intraslice import FAMILIES


def first_token(config: Any) -> int | None:
    """Return the token that every window must begin with, for models that are of no use without it; else None.

    Args:
        config: of a dense or pruned model.
    """
    spec = FAMILIES.get(str(config.model_type).removeprefix("intraslice_"))
    return config.bos_token_id if spec is not None and spec.starts_with_bos else None


def begin_windows(windows_NT: Tensor, token: int | None) -> Tensor:
    """Return the windows with this token in the place of their first one, int64 [N, T]; None changes nothing."""
    if token is None:
        return windows_NT
    windows = windows_NT.clone()
    windows[:, 0] = token
    return windows
