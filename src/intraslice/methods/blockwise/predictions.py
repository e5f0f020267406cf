"""What the predictions of changed models are worth beside those of the dense one, on a part of the calibration text.

Shapes: S sequences, T tokens, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intraslice.errors import NumericalError
from intraslice.layers.head import LanguageHead
from intraslice.placement import for_float64
from intraslice.streaming.hidden import HiddenStates
from intraslice.streaming.model import StreamedModel

JUDGED_POSITIONS = 512
"""At how many positions predictions are compared: those are the only ones whose logits are made."""

_LOGIT_POSITIONS = 128  # positions whose logits exist at once


def split_tokens(tokens_ST: Tensor, batch: int, *, fit: int, judge: int) -> tuple[Tensor, Tensor]:
    """Return the sequences that sites are fitted to and those that judge, in whole batches; one batch does both.

    Args:
        tokens_ST: calibration token ids.
        batch: sequences of a batch.
        fit: at most so many tokens to fit to, but at least a batch.
        judge: at most so many tokens that judge, and at most a quarter of all batches, but at least one.
    """
    batches, tokens = len(tokens_ST) // batch, batch * tokens_ST.shape[1]
    if batches < 2:
        return tokens_ST, tokens_ST
    judging = max(1, min(judge // tokens, batches // 4))
    fitted = max(1, min(fit // tokens, batches - judging))
    return tokens_ST[: fitted * batch], tokens_ST[fitted * batch : (fitted + judging) * batch]


def mean_divergences(
    model: StreamedModel, tokens_ST: Tensor, reference: HiddenStates, branches: Sequence[HiddenStates]
) -> list[float]:
    """Return the mean over the judged positions of KL(dense || branch), in nats.

    Args:
        model: the streamed model.
        tokens_ST: token ids of the sequences.
        reference: outputs of the last layer of the dense model.
        branches: the same of the others.

    Raises:
        NumericalError: logits are NaN or infinite.
    """
    head = LanguageHead(model.model)
    total = torch.zeros(len(branches), dtype=torch.float64)
    count, stride = 0, -(-tokens_ST.numel() // JUDGED_POSITIONS)
    for part in reference.slices():
        ends = [model.after_layers(tokens_ST[part], states.read(part)) for states in (reference, *branches)]
        dense, *others = (end.flatten(0, 1)[stride - 1 :: stride] for end in ends)
        for start in range(0, len(dense), _LOGIT_POSITIONS):
            at = slice(start, start + _LOGIT_POSITIONS)
            expected = head(dense[at]).float().log_softmax(-1)
            for number, other in enumerate(others):
                found = head(other[at]).float().log_softmax(-1)
                total[number] += float(for_float64(expected.exp() * (expected - found)).sum(dtype=torch.float64))
        count += len(dense)
    if not torch.isfinite(total).all():
        raise NumericalError("the logits of a model with pruned sites are NaN or infinite.")
    return (total / count).tolist()
