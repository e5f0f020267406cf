from __future__ import annotations

import pytest
import torch

from intraslice.evaluation.likelihood import can_pack, score_continuations
from support.tiny_models import CASES, ONE_PER_FAMILY, VOCAB, dense_model, pruned_model

UNLIMITED = tuple(case for case in CASES if "window" not in case and case != "phi3-gqa-partial-rope")


def requests(longest: int = 8) -> list[tuple[list[int], list[int]]]:
    """Four contexts with one to four continuations, mixed up; some share first tokens, some have one token."""
    generator = torch.Generator().manual_seed(3)

    def draw(length: int) -> list[int]:
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    contexts = [draw(4), draw(1), draw(2), draw(longest - 2)]
    same = draw(3)
    return [
        (contexts[0], same),
        (contexts[1], draw(4)),
        (contexts[0], [*same[:2], 5]),
        (contexts[2], draw(1)),
        (contexts[0], draw(1)),
        (contexts[2], draw(1)),
        (contexts[3], draw(2)),
        (contexts[0], draw(4)),
        (contexts[1], draw(1)),
    ]


def one_by_one(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        scores = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1].log_softmax(-1)
    chosen = torch.tensor(continuation)
    return scores.gather(1, chosen[:, None]).sum().item(), bool((scores.argmax(-1) == chosen).all())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [dense_model, pruned_model])
@pytest.mark.parametrize("case", UNLIMITED)
def test_equal_to_each_request_alone(case: str, make, attention: str):
    model = make(case, attention=attention)
    given = requests()
    # The likeliest continuation must be found to be so.
    best = [given[3][0], [int(model(input_ids=torch.tensor([given[3][0]])).logits[0, -1].argmax())]]
    given.append((best[0], best[1]))
    assert can_pack(model, given)
    expected = [one_by_one(model, *request) for request in given]
    for batch_size in (1, 3, 100):
        counted: list[int] = []
        found = score_continuations(model, given, batch_size=batch_size, advance=counted.append)
        # The logits are rounded to float32.
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-5)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert found[-1][1] and not found[0][1]
        assert sum(counted) == len(given)


def test_what_cannot_share_contexts():
    given = requests()
    windowed = dense_model("mistral-gqa-window")
    assert not can_pack(windowed, given)
    short = [request for request in given if len(request[0]) + len(request[1]) <= 5]
    assert short and can_pack(windowed, short)
    found = score_continuations(windowed, short, batch_size=2, advance=lambda units: None)
    expected = [one_by_one(windowed, *request)[0] for request in short]
    assert [score for score, _ in found] == pytest.approx(expected, abs=2e-5)
    other = dense_model(ONE_PER_FAMILY[0])
    other.config._attn_implementation = "flex_attention"
    assert not can_pack(other, given)
