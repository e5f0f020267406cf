from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import intraslice
from intraslice.errors import CalibrationError, RecipeError
from intraslice.evaluation import perplexity as perplexity_module
from intraslice.evaluation.domains import measure_divergence, measure_texts
from intraslice.evaluation.perplexity import measure_perplexity
from intraslice.evaluation.text_choice import TextChoice, parse_text, parse_texts, with_base
from support.tiny import VOCAB_SIZE, tiny_model

SEQLEN = 20


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(256, (5 * SEQLEN + 3,), generator=torch.Generator().manual_seed(0))


def by_hand(model: Any, dense: Any, tokens: torch.Tensor, windows: range) -> tuple[float, float, float, float]:
    """Return perplexities, KL divergence and agreement, in float64 and probability by probability."""
    nll, dense_nll, kl, agreed, count = 0.0, 0.0, 0.0, 0, 0
    for window in windows:
        block = tokens[window * SEQLEN : (window + 1) * SEQLEN]
        with torch.no_grad():
            q, p = (one(block[None]).logits[0].double().softmax(-1) for one in (model, dense))
        for place in range(SEQLEN - 1):
            following = int(block[place + 1])
            nll -= math.log(float(q[place, following]))
            dense_nll -= math.log(float(p[place, following]))
            kl += sum(float(p[place, v]) * math.log(float(p[place, v] / q[place, v])) for v in range(VOCAB_SIZE))
            agreed += int(q[place].argmax() == p[place].argmax())
            count += 1
    return math.exp(nll / count), math.exp(dense_nll / count), kl / count, agreed / count


@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("known", [True, False], ids=["head", "whole-logits"])
def test_kl_and_agreement_against_brute_force(
    tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch, chunk: int, known: bool
) -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    monkeypatch.setattr(perplexity_module, "CHUNK_POSITIONS", chunk)
    if not known:
        monkeypatch.setattr(perplexity_module, "decoder_and_head", lambda _: None)
    found = measure_divergence(model, dense, tokens, seqlen=SEQLEN, first=1, windows=3)
    own, other, kl, agreement = by_hand(model, dense, tokens, range(1, 4))
    assert found.model.perplexity == pytest.approx(own, rel=1e-5)
    assert found.dense.perplexity == pytest.approx(other, rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.agreement == agreement and 0 < agreement < 1
    alone = measure_perplexity(model, tokens, seqlen=SEQLEN, first=1, windows=3)
    assert alone.mean_nll == pytest.approx(found.model.mean_nll, rel=1e-9)


def test_a_model_is_not_away_from_itself(tokens: torch.Tensor) -> None:
    found = measure_divergence(tiny_model("llama"), tiny_model("llama"), tokens, seqlen=SEQLEN)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1 and found.model.mean_nll == found.dense.mean_nll


def test_other_vocabulary(tokens: torch.Tensor) -> None:
    with pytest.raises(RecipeError, match="272 tokens and the dense one of 300"):
        measure_divergence(tiny_model("llama"), tiny_model("llama", vocab_size=300), tokens, seqlen=SEQLEN)


def test_gaps_and_their_mean(tokens: torch.Tensor) -> None:
    model, dense = tiny_model("llama", seed=1), tiny_model("llama")
    texts = [(TextChoice("a", "a.txt", 0, 2), tokens), (TextChoice("b", "b.txt", 2), tokens.flip(0))]
    scores = measure_texts(model, texts, dense=dense, seqlen=SEQLEN)
    for score, (choice, stream) in zip(scores.texts, texts, strict=True):
        options: dict[str, Any] = {"seqlen": SEQLEN, "first": choice.first, "windows": choice.windows}
        own, other = (measure_perplexity(one, stream, **options) for one in (model, dense))
        assert score.name == choice.name and score.perplexity.num_windows == own.num_windows
        assert score.gap == pytest.approx(math.log(own.perplexity / other.perplexity), rel=1e-6)
    first, second = scores.texts
    assert first.gap is not None and second.gap is not None
    assert scores.mean_gap == pytest.approx((first.gap + second.gap) / 2)
    alone = measure_texts(model, texts, seqlen=SEQLEN)
    assert alone.mean_gap is None and alone.texts[0].kl is None
    assert alone.texts[1].perplexity.mean_nll == pytest.approx(second.perplexity.mean_nll, rel=1e-9)


def test_a_window_beyond_the_text(tokens: torch.Tensor) -> None:
    with pytest.raises(CalibrationError, match="has 5 windows of 20 tokens, so there is no window 5"):
        measure_texts(tiny_model("llama"), [(TextChoice("a", "a.txt", 5), tokens)], seqlen=SEQLEN)


# How a text is written.


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("builtin", TextChoice("builtin", "builtin", 0, 8)),
        ("builtin@4-9", TextChoice("builtin", "builtin", 4, 6)),
        ("python=builtin@4", TextChoice("python", "builtin", 4, 1)),
        ("rest=wikitext2@3-", TextChoice("rest", "wikitext2", 3, 8)),
        ("{folder}/my text.txt@0-1", TextChoice("my-text", "{folder}/my text.txt", 0, 2)),
        ("qa={folder}/my text.txt", TextChoice("qa", "{folder}/my text.txt", 0, 8)),
        ("{folder}/a=b@1-2.txt", TextChoice("a-b-1-2", "{folder}/a=b@1-2.txt", 0, 8)),
    ],
)
def test_what_a_text_means(tmp_path: Path, given: str, expected: TextChoice) -> None:
    for name in ("my text.txt", "a=b@1-2.txt"):
        (tmp_path / name).write_text("text")
    found = parse_text(given.format(folder=tmp_path), 8)
    assert found == TextChoice(expected.name, expected.source.format(folder=tmp_path), expected.first, expected.windows)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["builtin@5-2"], "end before they start"),
        (["builtin", "builtin@4-9"], "two texts are called 'builtin'"),
        ([], "no text is named"),
    ],
)
def test_texts_that_make_no_sense(given: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_texts(given)


def test_texts_that_are_not_there() -> None:
    with pytest.raises(CalibrationError, match="no text file 'none.txt'"):
        parse_text("qa=none.txt@0-3")
    with pytest.raises(CalibrationError, match="Did you mean 'wikitext2'"):
        parse_text("wiki=wikitxt2")


def test_paths_that_start_at_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a@1.txt").write_text("text")
    assert with_base("qa=data/qa.txt@0-5", tmp_path) == f"qa={tmp_path}/data/qa.txt@0-5"
    assert with_base("builtin@4-9", tmp_path) == "builtin@4-9"
    assert with_base("a@1.txt", tmp_path) == f"{tmp_path}/a@1.txt"


def test_texts_of_saved_models(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some words to judge a model on. " * 40)
    folder = tiny_folder("llama")
    options: dict[str, Any] = {"seqlen": 64, "windows": 2, "device": "cpu"}
    scores = intraslice.evaluate_texts(folder, [str(text), "b=builtin@1-2"], against=folder, **options)
    assert [score.name for score in scores.texts] == ["a", "b"]
    assert scores.texts[0].text == "a.txt" and scores.mean_gap == 0 and scores.mean_agreement == 1
    assert scores.texts[0].perplexity.perplexity == intraslice.evaluate(folder, text=str(text), **options).perplexity
