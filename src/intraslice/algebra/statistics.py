"""Sums over calibration tokens. Everything here adds; nothing here divides, selects or solves.

Shapes: N tokens, C channels, H heads, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SecondMoment:
    """Sum of x^T x over tokens, optionally against a second matrix y: x^T y.

    Products of one batch are computed in the dtype of the activations (float32 at least) and collected in a
    buffer of that dtype; the buffer is added to the float64 sum every `flush_tokens` tokens, so that rounding
    does not grow with the number of tokens.

    Args:
        rows: channels of x.
        columns: channels of y; None means y = x.
        device: where the sums live.
        dtype: dtype of the sums.
    """

    flush_tokens = 16384

    def __init__(self, rows: int, columns: int | None, device: torch.device, dtype: torch.dtype) -> None:
        self._symmetric = columns is None
        self._sum = torch.zeros(rows, rows if columns is None else columns, device=device, dtype=dtype)
        self._partial: Tensor | None = None
        self._pending = 0
        self.num_tokens = 0

    def update(self, x_NC: Tensor, y_NC: Tensor | None = None) -> None:
        """Add the tokens of x [N, rows] (and y [N, columns])."""
        x = _at_least_float32(x_NC)
        y = x if y_NC is None else _at_least_float32(y_NC)
        if self._partial is None:
            self._partial = torch.zeros_like(self._sum, dtype=x.dtype)
        self._partial.addmm_(x.T, y)
        self.num_tokens += x.shape[0]
        self._pending += x.shape[0]
        if self._pending >= self.flush_tokens:
            self._flush()

    def _flush(self) -> None:
        if self._partial is not None and self._pending:
            self._sum += self._partial
            self._partial.zero_()
            self._pending = 0

    @property
    def value(self) -> Tensor:
        """The sum [rows, columns] in float64 on the CPU, where it is solved."""
        self._flush()
        value = self._sum.to("cpu", torch.float64)
        return (value + value.T) / 2 if self._symmetric else value


class BlockSecondMoment:
    """Sum of x_b^T x_b over tokens for each block b of channels (a head, or a slice of `act`).

    Args:
        blocks: number of blocks.
        width: channels of a block.
        device: where the sums live.
        dtype: dtype of the sums.
    """

    def __init__(self, blocks: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self._sum = torch.zeros(blocks, width, width, device=device, dtype=dtype)

    def update(self, x_NC: Tensor) -> None:
        """Add the tokens of x [N, blocks * width]."""
        blocks, width, _ = self._sum.shape
        x_bNw = _at_least_float32(x_NC).view(-1, blocks, width).transpose(0, 1)
        self._sum += x_bNw.transpose(1, 2) @ x_bNw

    @property
    def value(self) -> Tensor:
        """The sums [blocks, width, width] in float64 on the CPU."""
        return self._sum.to("cpu", torch.float64)


class Sum:
    """Sum of tensors of one shape."""

    def __init__(self, *shape: int, device: torch.device, dtype: torch.dtype) -> None:
        self._sum = torch.zeros(*shape, device=device, dtype=dtype)

    def update(self, x: Tensor) -> None:
        """Add a tensor of the shape."""
        self._sum += x

    @property
    def value(self) -> Tensor:
        """The sum in float64 on the CPU."""
        return self._sum.to("cpu", torch.float64)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
