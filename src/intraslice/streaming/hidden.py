"""Hidden states of all calibration tokens between two layers, in memory or on disk.

Shapes: N sequences, T tokens a sequence, D hidden_size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from intraslice.files import reserve
from intraslice.streaming.model import StreamedModel


class HiddenStates:
    """A [N, T, D] buffer that is read and overwritten batch by batch.

    Args:
        shape: (N, T, D).
        dtype: dtype of the states.
        batch: sequences in one batch.
        device: compute device; the buffer itself stays on the host.
        path: file to keep the states in; None keeps them in memory.

    Raises:
        OutputError: the disk has no room for the file.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        batch: int,
        device: torch.device,
        path: Path | None = None,
    ) -> None:
        self._batch = batch
        self._device = device
        if path is None:
            self._states = torch.empty(shape, dtype=dtype)
        else:
            # A shared mapping: pages are written back by the operating system and need not stay in memory.
            size = shape[0] * shape[1] * shape[2]
            reserve(path, size * dtype.itemsize)
            self._states = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    @property
    def batch(self) -> int:
        """Sequences in one batch."""
        return self._batch

    @property
    def num_batches(self) -> int:
        """How many batches a pass has."""
        return -(-self._states.shape[0] // self._batch)

    def slices(self) -> Iterator[slice]:
        """Yield the sequences of each batch, in order."""
        for start in range(0, self._states.shape[0], self._batch):
            yield slice(start, min(start + self._batch, self._states.shape[0]))

    def read(self, part: slice) -> Tensor:
        """Return the states of some sequences on the compute device, [B, T, D].

        On a CPU this is a view: what is still needed of it must be computed before `write` overwrites it.
        """
        return self._states[part].to(self._device)

    def write(self, part: slice, states_BTD: Tensor) -> None:
        """Overwrite the states of some sequences."""
        self._states[part].copy_(states_BTD)

    def clone(self) -> HiddenStates:
        """Return a copy, in memory."""
        count, seqlen, width = self._states.shape
        cloned = HiddenStates((count, seqlen, width), self._states.dtype, self._batch, self._device)
        cloned._states.copy_(self._states)
        return cloned

    def first(self, count: int) -> HiddenStates:
        """Return the states of the first sequences: the same memory, not a copy."""
        part = copy.copy(self)
        part._states = self._states[:count]
        return part

    def release(self) -> None:
        """Free the buffer; nothing can be read or written afterwards."""
        self._states = self._states.new_empty(0)


@dataclass(frozen=True)
class Streams:
    """Hidden states of all calibration tokens at the input of a layer; each layer overwrites them with its outputs.

    Attributes:
        pruned: as the layers pruned before give them.
        dense: as the dense model has them; None when no site is repaired against it: all sites are
            then repaired against their own dense output.
    """

    pruned: HiddenStates
    dense: HiddenStates | None


def embedded_states(model: StreamedModel, tokens_NT: Tensor, path: Path | None) -> HiddenStates:
    """Return the hidden states of all tokens at the input of the first layer.

    Args:
        model: the streamed model, before its embeddings are released.
        tokens_NT: token ids, [N, T].
        path: file to keep the states in; None keeps them in memory.
    """
    shape = (tokens_NT.shape[0], tokens_NT.shape[1], model.config.hidden_size)
    hidden = HiddenStates(shape, model.placement.compute_dtype, model.batch_shape[0], model.placement.device, path)
    for part in hidden.slices():
        hidden.write(part, model.embed(tokens_NT[part]))
    return hidden
