"""How far a student is from its teacher: in what they predict, and in what their layers give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from intraslice.layers.head import LanguageHead
from intraslice.layers.logit_loss import Target, divergence_sum, logit_loss


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return ||student - teacher||^2 / ||teacher||^2, the mean over layers.

    Args:
        student: output of each layer, [B, T, D].
        teacher: of the same layers and shapes.
    """
    errors = [
        (ours.float() - theirs.float()).square().sum() / theirs.float().square().sum()
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()


class Distillation:
    """Teacher and student side by side.

    Args:
        student: pruned causal language model; its parameters may be trained.
        teacher: dense one, with the same vocabulary.
        hidden_weight: weight of `hidden_loss`.
        task_weight: weight of the task loss.
    """

    def __init__(self, student: Any, teacher: Any, *, hidden_weight: float, task_weight: float) -> None:
        self._student, self._teacher = student, teacher
        self._student_head, self._teacher_head = LanguageHead(student), LanguageHead(teacher)
        self._hidden_weight, self._task_weight = hidden_weight, task_weight

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the loss on sequences [B, T], with gradients on what the student trains."""
        with torch.no_grad():
            theirs = self._run(self._teacher, tokens)
        ours = self._run(self._student, tokens)
        target = Target(
            head=self._teacher_head,
            hidden=theirs.last_hidden_state.flatten(0, 1),
            next_tokens=functional.pad(tokens[:, 1:], (0, 1), value=-1).flatten(),
            task_weight=self._task_weight,
        )
        head = self._student.get_output_embeddings()
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        loss = logit_loss(self._student_head, ours.last_hidden_state.flatten(0, 1), target, trained)
        if self._hidden_weight:
            loss = loss + self._hidden_weight * hidden_loss(ours.hidden_states[1:], theirs.hidden_states[1:])
        return loss

    @torch.no_grad()
    def held_out(self, tokens: Tensor, batch: int) -> float:
        """Return the mean KL(teacher || student) of a position of sequences [N, T], `batch` of them at a time."""
        total = 0.0
        for part in tokens.split(batch):
            part = part.to(self._student.device)
            ours, theirs = self._run(self._student, part), self._run(self._teacher, part)
            total += divergence_sum(
                self._student_head,
                ours.last_hidden_state.flatten(0, 1),
                self._teacher_head,
                theirs.last_hidden_state.flatten(0, 1),
            )
        return total / tokens.numel()

    def forget_gradients(self) -> None:
        """Drop what backward passes have left in the student."""
        self._student.zero_grad(set_to_none=True)

    def _run(self, model: Any, tokens: Tensor) -> Any:
        # Dropout would add noise to what is to be matched; gradients flow all the same.
        model.eval()
        return model.get_decoder()(
            input_ids=tokens, use_cache=False, output_hidden_states=bool(self._hidden_weight), return_dict=True
        )
