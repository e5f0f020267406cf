"""The loss in pieces, and its gradients, against the plain formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from intraslice.healing.loss import Distillation, hidden_loss
from intraslice.layers.logit_loss import Target, divergence_sum, logit_loss
from support.tiny import tiny_model

P, D, V = 13, 6, 29


class Head(torch.nn.Linear):
    """A head that also caps its logits, as some models do."""

    def forward(self, x):
        return 3 * torch.tanh(super().forward(x) / 3)


def case(task_weight=0.0):
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, teacher = Head(D, V).double(), Head(D + 1, V).double()
    hidden = torch.randn(P, D, generator=generator, dtype=torch.float64).requires_grad_()
    next_tokens = torch.randint(V, (P,), generator=generator)
    next_tokens[[3, P - 1]] = -1
    theirs = torch.randn(P, D + 1, generator=generator, dtype=torch.float64)
    return student, hidden, Target(head=teacher, hidden=theirs, next_tokens=next_tokens, task_weight=task_weight)


def plain(student, hidden, target):
    log_student = student(hidden).log_softmax(-1)
    log_teacher = target.head(target.hidden).log_softmax(-1).detach()
    kl = functional.kl_div(log_student, log_teacher, log_target=True, reduction="sum")
    nll = functional.nll_loss(log_student, target.next_tokens, ignore_index=-1, reduction="sum")
    return (kl + target.task_weight * nll) / len(hidden)


@pytest.mark.parametrize("piece", [1, 5, P, 100])
@pytest.mark.parametrize("task_weight", [0.0, 0.7])
def test_loss_and_gradients_are_those_of_the_formula(piece, task_weight):
    student, hidden, target = case(task_weight)
    leaves = [hidden, *student.parameters()]
    expected = plain(student, hidden, target)
    wanted = torch.autograd.grad(2 * expected, leaves)
    actual = logit_loss(student, hidden, target, tuple(student.parameters()), piece)
    # The logits are compared in float32, whatever they come in.
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(2 * actual, leaves), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_frozen_head_gets_no_gradient():
    student, hidden, target = case()
    student.requires_grad_(False)
    logit_loss(student, hidden, target).backward()
    assert hidden.grad is not None and all(parameter.grad is None for parameter in student.parameters())


def test_sum_of_divergences():
    student, hidden, target = case()
    found = divergence_sum(student, hidden, target.head, target.hidden, piece=4)
    assert found / P == pytest.approx(float(plain(student, hidden, target).detach()), rel=1e-5)


def test_hidden_loss_is_relative_and_averaged_over_layers():
    ones, twos = torch.ones(1, 2, 3), 2 * torch.ones(1, 2, 3)
    assert float(hidden_loss([ones, twos], [twos, twos])) == pytest.approx((1 / 4 + 0) / 2)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_is_at_no_distance_from_itself(family):
    model = tiny_model(family)
    tokens = torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(0))
    same = Distillation(model, model, hidden_weight=1.0, task_weight=0.0)
    assert abs(same.held_out(tokens, 2)) < 1e-6
    assert abs(float(same.loss(tokens).detach())) < 1e-6


def test_loss_of_models_is_that_of_their_logits():
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    tokens = torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(0))
    ours, theirs = student(tokens).logits.log_softmax(-1), teacher(tokens).logits.log_softmax(-1)
    kl = functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean()
    nll = functional.nll_loss(ours[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum") / tokens.numel()
    expected = kl + 0.5 * nll
    leaves = [parameter for name, parameter in student.named_parameters() if "layers" in name]
    wanted = torch.autograd.grad(expected, leaves)
    both = Distillation(student, teacher, hidden_weight=0.0, task_weight=0.5)
    actual = both.loss(tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    for mine, reference in zip(torch.autograd.grad(actual, leaves), wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-6)
    assert both.held_out(tokens, 2) == pytest.approx(float(kl.detach()), rel=1e-5)
