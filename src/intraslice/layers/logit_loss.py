"""How far the predictions of two models are apart, without the logits of all positions ever existing at once.

Shapes: P positions (sequences times tokens), D width of the decoder outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from intraslice.placement import for_float64

PIECE = 512
"""Positions whose logits exist at once; two vocabularies of 49k x 512 float32 numbers are 200 MB."""

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the logits of the student are compared with.

    Attributes:
        head: logits [n, V] of the teacher for its decoder outputs.
        hidden: decoder outputs of the teacher, [P, D].
        next_tokens: token ids [P] that follow, -1 where none does.
        task_weight: weight of their negative log likelihood beside the divergence.
    """

    head: Head
    hidden: Tensor
    next_tokens: Tensor
    task_weight: float


class _LogitLoss(torch.autograd.Function):
    """The loss of all positions and its gradient in one pass, so that no logits are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, head: Head, target: Target, piece: int, hidden_PD: Tensor, *parameters: Tensor) -> Tensor:
        """Return the mean loss."""
        grad_PD = torch.empty_like(hidden_PD)
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        loss = hidden_PD.new_zeros((), dtype=torch.promote_types(hidden_PD.dtype, torch.float32))
        positions = len(hidden_PD)
        for start in range(0, positions, piece):
            part = slice(start, start + piece)
            with torch.enable_grad():
                hidden = hidden_PD[part].detach().requires_grad_()
                logits_nV = head(hidden)
            kl, nll, slope_nV = _compare(_wide(logits_nV.detach()), target, part)
            loss += kl + target.task_weight * nll
            own, *shared = torch.autograd.grad(
                logits_nV, [hidden, *parameters], slope_nV.div_(positions).to(logits_nV.dtype)
            )
            grad_PD[part] = own
            for total, more in zip(grads, shared, strict=True):
                total += more
        ctx.save_for_backward(grad_PD, *grads)
        return loss / positions

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what was computed on the way."""
        return (None, None, None, *(grad * slopes[0].to(grad.dtype) for grad in ctx.saved_tensors))


def _compare(logits_nV: Tensor, target: Target, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums of KL(teacher || student) and of the task loss, and the gradient on the logits [n, V]."""
    log_student = functional.log_softmax(logits_nV, dim=-1)
    with torch.no_grad():
        log_teacher = functional.log_softmax(_wide(target.head(target.hidden[part])), dim=-1)
    teacher = log_teacher.exp()
    kl = log_teacher.sub_(log_student).mul_(teacher).sum()
    nll = torch.zeros_like(kl)
    tokens = target.next_tokens[part]
    if target.task_weight:
        nll = functional.nll_loss(log_student, tokens, ignore_index=-1, reduction="sum")
    # In place: each of these is as large as the logits.
    slope = log_student.exp_()
    if target.task_weight:
        known = torch.nonzero(tokens >= 0).squeeze(1)
        slope[known] *= 1 + target.task_weight
        slope[known, tokens[known]] -= target.task_weight
    slope -= teacher
    return kl, nll, slope


def logit_loss(
    head: Head, hidden_PD: Tensor, target: Target, parameters: Sequence[Tensor] = (), piece: int = PIECE
) -> Tensor:
    """Return KL(teacher || student) plus the weighted task loss, the mean over positions.

    Args:
        head: logits [n, V] of the student.
        hidden_PD: decoder outputs of the student.
        target: what they are compared with.
        parameters: of the student's head that are trained.
        piece: positions at once.

    Returns:
        A scalar, float32 at least, with gradients on `hidden_PD` and `parameters`.
    """
    return _LogitLoss.apply(head, target, piece, hidden_PD, *parameters)  # type: ignore[return-value]


@torch.no_grad()
def divergence_sum(student: Head, student_PD: Tensor, teacher: Head, teacher_PD: Tensor, piece: int = PIECE) -> float:
    """Return the sum over positions of KL(teacher || student), in nats."""
    total = 0.0
    for ours, theirs in zip(student_PD.split(piece), teacher_PD.split(piece), strict=True):
        log_student = functional.log_softmax(_wide(student(ours)), dim=-1)
        log_teacher = functional.log_softmax(_wide(teacher(theirs)), dim=-1)
        total += float(for_float64(log_teacher.exp() * (log_teacher - log_student)).sum(dtype=torch.float64))
    return total


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
