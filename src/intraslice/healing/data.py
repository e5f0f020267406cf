"""The token sequences of a healing: those that are trained on, in their order, and those that judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from intraslice.data.calibration import Calibration, fingerprint, load_calibration
from intraslice.errors import CalibrationError
from intraslice.healing.options import HealOptions
from intraslice.progress import Progress


@dataclass(frozen=True, kw_only=True)
class HealingText:
    """Sequences of a text.

    Attributes:
        train: token ids [N, T].
        held_out: token ids [H, T]; none of them is in `train`.
        source: name or path of the text.
        fingerprint: sha256 of all sequences.
    """

    train: Tensor
    held_out: Tensor
    source: str
    fingerprint: str


def load_healing_text(
    source: str,
    tokenizer: Any,
    options: HealOptions,
    steps: int,
    *,
    vocab_size: int,
    model_folder: Path,
    device: str,
    progress: Progress,
) -> HealingText:
    """Return the sequences for a number of steps: each of them once, or all that the text has.

    Args:
        source: text, as for `prune`.
        tokenizer: of teacher and student.
        options: sizes and seed.
        steps: of the optimizer.
        vocab_size: token ids are below this.
        model_folder: folder of the dense model; "self" samples from it.
        device: where "self" samples.
        progress: shows the sampling.

    Raises:
        CalibrationError: the text is missing, empty, or too short for one step beside what is held out.
    """

    def load(num_samples: int) -> Calibration:
        return load_calibration(
            source,
            tokenizer,
            num_samples=num_samples,
            seqlen=options.seqlen,
            # Another choice than that of a prune with the same seed: what judges is not what the prune was fitted to.
            seed=options.seed + 1,
            vocab_size=vocab_size,
            model_folder=model_folder,
            progress=progress,
            text_field=options.text_field,
            device=device,
        )

    least = options.held_out + options.batch_size
    found = _as_many(load, least, options.held_out + steps * options.batch_size)
    # Sequences of a mixture may come source by source; each source must have a part in what is held out.
    order = torch.randperm(len(found.tokens), generator=torch.Generator().manual_seed(options.seed))
    held_out, train = found.tokens[order].tensor_split([options.held_out])
    return HealingText(
        train=train, held_out=held_out, source=found.source, fingerprint=fingerprint(found.tokens[order])
    )


def _as_many(load: Callable[[int], Calibration], least: int, wanted: int) -> Calibration:
    """Return as many sequences as a text has, up to `wanted`; a sixteenth may be missed."""
    try:
        return load(wanted)
    except CalibrationError:
        if wanted == least:
            raise
    best, low, high = load(least), least, wanted
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        try:
            best, low = load(middle), middle
        except CalibrationError:
            high = middle
    return best


class Sequences(Dataset):
    """The training sequences in the order in which they are shown; the same for the same seed.

    Args:
        tokens: token ids [N, T].
        length: how many are shown in all; after the last one all come again, in another order.
        seed: of the order.
    """

    def __init__(self, tokens: Tensor, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        rounds = -(-length // len(tokens))
        self._tokens = tokens
        self._order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(rounds)])[:length]

    def __len__(self) -> int:
        """Return how many sequences are shown."""
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sequence [T] under the name that models read."""
        return {"input_ids": self._tokens[self._order[index]]}
