"""The token sequences of a healing: those that are trained on, in their order, and those that judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from intraslice.checkpoint.reader import Checkpoint
from intraslice.data.calibration import Calibration, fingerprint
from intraslice.data.mixture import parse_source, share_out
from intraslice.data.text import SAMPLED
from intraslice.errors import CalibrationError
from intraslice.healing.options import HealOptions
from intraslice.options import CalibrationOptions
from intraslice.progress import Progress
from intraslice.pruning import calibrate


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
    dense: Checkpoint, source: str, options: HealOptions, steps: int, progress: Progress
) -> HealingText:
    """Return the sequences for a number of steps: each of them once, or all that the text has.

    Args:
        dense: the teacher; its tokenizer cuts the text, and it is sampled from where the text asks for that.
        source: text, as for `prune`.
        options: sizes and seed.
        steps: of the optimizer.
        progress: shows the sampling.

    Raises:
        CalibrationError: the text is missing, empty, or too short for one step beside what is held out.
    """

    def load(of: str, num_samples: int) -> Calibration:
        wanted = CalibrationOptions(
            source=of,
            num_samples=num_samples,
            seqlen=options.seqlen,
            # Another choice than that of a prune with the same seed: what judges is not what the prune was fitted to.
            seed=options.seed + 1,
            text_field=options.text_field,
        )
        return calibrate(dense, wanted, device=options.device, progress=progress)

    def fits(num_samples: int) -> bool:
        # Only the texts, which can be too short; sampling takes long, and there is always more.
        parts = parse_source(source)
        try:
            for part, share in zip(parts, share_out(parts, num_samples), strict=True):
                if share and part.source not in SAMPLED:
                    load(part.source, share)
        except CalibrationError:
            return False
        return True

    least = options.held_out + options.batch_size
    found = load(source, _most(fits, least, options.held_out + steps * options.batch_size))
    # Sequences of a mixture may come source by source; each source must have a part in what is held out.
    order = torch.randperm(len(found.tokens), generator=torch.Generator().manual_seed(options.seed))
    held_out, train = found.tokens[order].tensor_split([options.held_out])
    return HealingText(
        train=train, held_out=held_out, source=found.source, fingerprint=fingerprint(found.tokens[order])
    )


def _most(fits: Callable[[int], bool], least: int, wanted: int) -> int:
    """Return the largest number up to `wanted` that fits, give or take a sixteenth; `least` if not even that does."""
    if fits(wanted):
        return wanted
    low, high = least, wanted
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


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
