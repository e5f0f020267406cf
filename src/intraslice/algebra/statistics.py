"""Sums over calibration tokens, and the only place where sums live.

Everything here adds; nothing here divides, selects or solves. A sum can be merged with another one of its kind, be
reduced over the processes of a group that have each seen other tokens, and is finished in float64 on the CPU, where
it is solved.

Products are taken where the activations are; the sums may live elsewhere, because some devices have no float64.

Shapes: N tokens, C channels, H heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor


class Accumulator(Protocol):
    """A sum of one kind."""

    def add(self, value: Tensor) -> None:
        """Add a finished sum, for example one that another process has saved."""
        ...

    def reduce(self, group: Any = None) -> None:
        """Add the sums of all processes of a torch.distributed group; all of them have the total then."""
        ...

    @property
    def value(self) -> Tensor:
        """The sum on the CPU."""
        ...


def _all_reduce(tensor: Tensor, group: Any) -> None:
    import torch.distributed

    torch.distributed.all_reduce(tensor, group=group)


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

    def update(self, x_NC: Tensor, y_NC: Tensor | None = None) -> None:
        """Add the tokens of x [N, rows] (and y [N, columns])."""
        x = _at_least_float32(x_NC)
        y = x if y_NC is None else _at_least_float32(y_NC)
        if self._partial is None:
            self._partial = torch.zeros_like(self._sum, dtype=x.dtype, device=x.device)
        self._partial.addmm_(x.T, y)
        self._pending += x.shape[0]
        if self._pending >= self.flush_tokens:
            self._flush()

    def _flush(self) -> None:
        if self._partial is not None and self._pending:
            self._sum += self._partial.to(self._sum.device)
            self._partial.zero_()
            self._pending = 0

    def add(self, value: Tensor) -> None:
        """Add a finished sum [rows, columns]."""
        self._sum += value.to(self._sum)

    def reduce(self, group: Any = None) -> None:
        """Add the sums of all processes of a group."""
        self._flush()
        _all_reduce(self._sum, group)

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
        self._sum += (x_bNw.transpose(1, 2) @ x_bNw).to(self._sum.device)

    def add(self, value: Tensor) -> None:
        """Add finished sums [blocks, width, width]."""
        self._sum += value.to(self._sum)

    def reduce(self, group: Any = None) -> None:
        """Add the sums of all processes of a group."""
        _all_reduce(self._sum, group)

    @property
    def value(self) -> Tensor:
        """The sums [blocks, width, width] in float64 on the CPU."""
        return self._sum.to("cpu", torch.float64)


class Sum:
    """Sum of tensors of one shape; of numbers, when there is no shape.

    Args:
        shape: of the tensors.
        device: where the sum lives.
        dtype: dtype of the sum.
    """

    def __init__(self, *shape: int, device: torch.device, dtype: torch.dtype) -> None:
        self._sum = torch.zeros(shape, device=device, dtype=dtype)

    def update(self, x: Tensor | float) -> None:
        """Add a tensor of the shape, or a number."""
        self._sum += x.to(self._sum.device) if isinstance(x, Tensor) else x

    def add(self, value: Tensor) -> None:
        """Add a finished sum."""
        self._sum += value.to(self._sum)

    def reduce(self, group: Any = None) -> None:
        """Add the sums of all processes of a group."""
        _all_reduce(self._sum, group)

    @property
    def value(self) -> Tensor:
        """The sum in float64 on the CPU."""
        return self._sum.to("cpu", torch.float64)


class Rows:
    """One row per calibration sequence, float64 on the CPU. Each row is written once, by the process that has it.

    Args:
        num_rows: S.
        width: C.
        device: where processes exchange them.
    """

    def __init__(self, num_rows: int, width: int, device: torch.device) -> None:
        self._device = device
        self._rows = torch.zeros(num_rows, width, dtype=torch.float64)

    def write(self, part: slice, rows_SC: Tensor) -> None:
        """Write the rows of some sequences."""
        # Not in one step: some devices have no float64.
        self._rows[part] = rows_SC.to("cpu").to(torch.float64)

    def add(self, value: Tensor) -> None:
        """Add rows of another process: those that it did not write are zero there."""
        self._rows += value

    def reduce(self, group: Any = None) -> None:
        """Gather the rows of all processes of a group."""
        rows = self._rows.to(self._device)
        _all_reduce(rows, group)
        self._rows.copy_(rows)

    @property
    def value(self) -> Tensor:
        """All rows, [S, C]."""
        return self._rows


_Kind = TypeVar("_Kind", bound=Accumulator)


class Statistics:
    """Sums by name: what is measured together is merged, reduced and finished together.

    Args:
        device: where the sums live.
        dtype: dtype of the sums.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._sums: dict[str, Accumulator] = {}

    def second_moment(self, name: str, rows: int, columns: int | None = None) -> SecondMoment:
        """Return a new `SecondMoment`."""
        return self._add(name, SecondMoment(rows, columns, self._device, self._dtype))

    def block_second_moment(self, name: str, blocks: int, width: int) -> BlockSecondMoment:
        """Return a new `BlockSecondMoment`."""
        return self._add(name, BlockSecondMoment(blocks, width, self._device, self._dtype))

    def sum(self, name: str, *shape: int) -> Sum:
        """Return a new `Sum` of tensors of a shape."""
        return self._add(name, Sum(*shape, device=self._device, dtype=self._dtype))

    def number(self, name: str) -> Sum:
        """Return a new sum of numbers, float64: an energy, or a count of tokens."""
        return self._add(name, Sum(device=self._device, dtype=torch.float64))

    def rows(self, name: str, num_rows: int, width: int) -> Rows:
        """Return new `Rows`."""
        return self._add(name, Rows(num_rows, width, self._device))

    def _add(self, name: str, accumulator: _Kind) -> _Kind:
        assert name not in self._sums, f"there is a sum {name!r} already"
        self._sums[name] = accumulator
        return accumulator

    def of(self, name: str) -> Any:
        """Return one of the sums."""
        return self._sums[name]

    def merge(self, other: Statistics) -> None:
        """Add statistics of the same names and shapes; it may lack some of them."""
        self.add(other.finish())

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add finished sums, by name: what `finish` gave."""
        for name, value in values.items():
            self._sums[name].add(value)

    def reduce(self, group: Any = None) -> None:
        """Add the statistics of all processes of a torch.distributed group, each of which has seen other tokens."""
        for _, accumulator in sorted(self._sums.items()):
            accumulator.reduce(group)

    def finish(self) -> dict[str, Tensor]:
        """Return all sums by name, float64 on the CPU.

        They may share memory with what goes on adding: whoever keeps them beyond that clones them.
        """
        return {name: accumulator.value for name, accumulator in self._sums.items()}


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
