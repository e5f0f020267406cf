"""What can be asked of healing, and the sentences for what cannot."""

from __future__ import annotations

import pytest

from intraslice.errors import RecipeError
from intraslice.healing.options import Budget, HealOptions, num_steps, parse_budget


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0.3M", Budget(tokens=300_000)),
        ("300k", Budget(tokens=300_000)),
        ("1G", Budget(tokens=10**9)),
        ("4096", Budget(tokens=4096)),
        ("20min", Budget(seconds=1200)),
        ("1.5 h", Budget(seconds=5400)),
        ("90s", Budget(seconds=90)),
    ],
)
def test_budgets(text, expected):
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "M", "ten", "5 bananas", "-1M", "0", "0min", "1e6", "nan"])
def test_what_is_no_budget(text):
    with pytest.raises(RecipeError, match="budget"):
        parse_budget(text)


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"weights": "half"}, "weights"),
        ({"precision": "int8"}, "precision"),
        ({"seqlen": 1}, "seqlen"),
        ({"batch_size": 0}, "batch_size"),
        ({"rank": 0}, "rank"),
        ({"held_out": 0}, "held_out"),
        ({"evaluate_every": 0}, "evaluate_every"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"hidden_weight": -1.0}, "hidden_weight"),
        ({"task_weight": float("inf")}, "task_weight"),
        ({"batch_size": 4, "accumulate": 3}, "accumulate"),
        ({"weights": "lora", "train_embeddings": True}, "train_embeddings"),
    ],
)
def test_options_out_of_range(settings, word):
    with pytest.raises(RecipeError, match=word):
        HealOptions(budget="1M", **settings)


def test_steps_of_a_budget():
    options = HealOptions(budget="1M", seqlen=512, batch_size=4)
    assert num_steps(2048 * 3 + 5, options) == 3
    with pytest.raises(RecipeError, match="smaller than one step"):
        num_steps(2047, options)


@pytest.mark.parametrize("steps, every", [(10, 25), (500, 25), (501, 26), (2000, 100)])
def test_measurements_are_a_twentieth_of_the_work_at_most(steps, every):
    assert HealOptions(budget="1M").evaluation_steps(steps) == every
    assert HealOptions(budget="1M", evaluate_every=7).evaluation_steps(steps) == 7
