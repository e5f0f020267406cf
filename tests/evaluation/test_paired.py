from __future__ import annotations

import math

import pytest

from intraslice.evaluation.paired import difference, differences


def test_the_paired_error_is_that_of_the_questions_that_differ() -> None:
    # 10 questions: 2 are lost, 1 is gained, 7 are answered alike.
    dense, own = "1111100000", "0011110000"
    found = difference(own, dense)
    lost, gained, count = 2, 1, 10
    assert found.difference == pytest.approx((gained - lost) / count)
    # McNemar's variance of the difference, with n - 1 instead of n.
    variance = (gained + lost - (gained - lost) ** 2 / count) / (count - 1)
    assert found.stderr == pytest.approx(math.sqrt(variance / count))


def test_equal_answers_leave_no_doubt() -> None:
    assert difference("0101", "0101").stderr == 0
    assert difference("1", "0").stderr is None


def test_the_average_takes_each_task_once() -> None:
    own, dense = {"a": "1100", "b": "10"}, {"a": "1010", "b": "11"}
    found = differences(own, dense)
    assert found is not None
    each = [difference(own[name], dense[name]) for name in ("a", "b")]
    assert found.average.difference == pytest.approx(sum(one.difference for one in each) / 2)
    assert found.average.stderr == pytest.approx(math.sqrt(sum((one.stderr or 0) ** 2 for one in each)) / 2)


@pytest.mark.parametrize("dense", [{"a": None}, {}, {"a": "10"}])
def test_answers_that_cannot_be_paired(dense: dict[str, str | None]) -> None:
    assert differences({"a": "101"}, dense) is None
