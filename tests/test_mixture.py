from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from intraslice.data import sampling
from intraslice.data.calibration import Calibration, load_calibration
from intraslice.data.mixture import MIXTURES, Part, check_source, map_parts, parse_source, share_out, short_source
from intraslice.data.shipped import HELD_OUT_CHARS, SHIPPED, held_out_code
from intraslice.data.text import SAMPLED, SELF_KINDS, load_text
from intraslice.errors import CalibrationError
from support.tiny import BOS, EOS, VOCAB_SIZE, tiny_tokenizer

Folder = Callable[..., Path]
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}<s>reply:"


def calibrate(source: str, tokenizer: Any, **changes: Any) -> Calibration:
    options: dict[str, Any] = {
        "num_samples": 8,
        "seqlen": 16,
        "seed": 0,
        "vocab_size": VOCAB_SIZE,
        "model_folder": Path("/nowhere"),
        "device": "cpu",
    }
    return load_calibration(source, tokenizer, **{**options, **changes})


def rows(calibration: Calibration) -> set[tuple[int, ...]]:
    return {tuple(row) for row in calibration.tokens.tolist()}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a.txt").write_text("aeiou " * 100)
    (tmp_path / "b.txt").write_text("12345 " * 100)
    (tmp_path / "one, two:3.txt").write_text("xyz " * 200)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# How it is written.


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("builtin", [("builtin", 1.0)]),
        ("builtin:3", [("builtin", 1.0)]),
        ("self:1,code:3", [("self", 0.25), ("code", 0.75)]),
        (" self , code ", [("self", 0.5), ("code", 0.5)]),
        ("a.txt:0.5,b.txt:0.5", [("a.txt", 0.5), ("b.txt", 0.5)]),
        (r"C:\\data\\notes.txt:2,self:2", [(r"C:\\data\\notes.txt", 0.5), ("self", 0.5)]),
        (r"C:\\data\\notes.txt,self", [(r"C:\\data\\notes.txt", 0.5), ("self", 0.5)]),
        ("one, two:3.txt", [("one, two:3.txt", 1.0)]),
    ],
)
def test_parts(files: Path, source: str, expected: list[tuple[str, float]]) -> None:
    assert parse_source(source) == [Part(*part) for part in expected]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("self:1,code", "gives no weight to 'code'"),
        ("self:1,self:2", "names 'self' twice"),
        ("self:1,", "has an empty part"),
        ("self:0,code:1", "the weight of 'self'"),
        ("self:-1,code:1", "the weight of 'self'"),
        ("self:nan,code:1", "the weight of 'self'"),
        ("self:inf,code:1", "the weight of 'self'"),
        ("self,cod", "'cod' is unknown"),
        ("self,none.txt", "no text file 'none.txt'"),
        ("offlin-mix", "Did you mean 'offline-mix'"),
    ],
)
def test_mixtures_that_make_no_sense(files: Path, source: str, words: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        check_source(source)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_named_mixture_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXTURES, "small-mix", "self:1,code:1")
    assert parse_source("small-mix:1,self:1") == [Part("self", 0.75), Part("code", 0.25)]
    for name in MIXTURES:
        check_source(name)
        assert sum(part.weight for part in parse_source(name)) == pytest.approx(1)


def test_paths_are_shortened_part_by_part() -> None:
    assert short_source("/x/a.txt:0.5,self:0.5") == "a.txt:0.5,self:0.5"
    assert short_source("/x/a.txt") == "a.txt"
    assert map_parts("a:1,b:2", str.upper) == "A:1,B:2"


def test_shares_add_up() -> None:
    parts = [Part("a", 0.5), Part("b", 0.3), Part("c", 0.2)]
    assert share_out(parts, 10) == [5, 3, 2]
    assert share_out(parts, 4) == [2, 1, 1]
    assert share_out(parts, 1) == [1, 0, 0]
    assert share_out([Part("a", 1 / 3)] * 3, 64) == [22, 21, 21]


# What comes of it.


def test_sequences_come_from_one_source_each_in_the_wanted_shares(tokenizer: Any, files: Path) -> None:
    mixed = calibrate("a.txt:3,b.txt:1", tokenizer)
    assert mixed.parts == {"a.txt": 6, "b.txt": 2} and mixed.source == "a.txt:3,b.txt:1"
    letters = rows(calibrate("a.txt", tokenizer, num_samples=6))
    digits = rows(calibrate("b.txt", tokenizer, num_samples=2))
    from_a = [tuple(row) in letters for row in mixed.tokens.tolist()]
    assert sum(from_a) == 6 and rows(mixed) == letters | digits
    # Interleaved: not source by source.
    assert from_a not in ([True] * 6 + [False] * 2, [False] * 2 + [True] * 6)
    assert torch.equal(mixed.tokens, calibrate("a.txt:3,b.txt:1", tokenizer).tokens)
    assert mixed.fingerprint != calibrate("a.txt:3,b.txt:1", tokenizer, seed=1).fingerprint


def test_one_part_is_the_source_itself(tokenizer: Any, files: Path) -> None:
    alone, written = calibrate("a.txt", tokenizer), calibrate("a.txt:2", tokenizer)
    assert torch.equal(alone.tokens, written.tokens) and alone.parts == written.parts == {}
    assert written.source == "a.txt"


def test_a_short_part_is_named(tokenizer: Any, files: Path) -> None:
    with pytest.raises(CalibrationError, match="'b.txt' has 600 tokens"):
        calibrate("a.txt:1,b.txt:99", tokenizer, num_samples=64)


# Text that ships with Python.


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_text_is_enough_and_repeats(name: str) -> None:
    text = load_text(name, min_chars=600_000)
    assert len(text) >= 600_000 and text == load_text(name, min_chars=600_000)


def test_what_is_judged_on_is_in_no_mixture() -> None:
    from pydoc_data.topics import topics

    first, last = HELD_OUT_CHARS
    judged = "\n\n".join(topics[name] for name in sorted(topics))[first:last]
    pieces = [judged[start : start + 300] for start in range(500, len(judged) - 500, 1000)]
    code = held_out_code()
    assert len(code) > 400_000
    pieces += [code[start : start + 300] for start in range(0, len(code) - 300, 5000)]
    for name in sorted(SHIPPED.keys() - {"builtin"}):
        text = load_text(name, min_chars=1_200_000)
        assert not [piece for piece in pieces if piece in text], f"{name} holds what is judged on"
    for mixture in MIXTURES:
        assert "builtin" not in {part.source for part in parse_source(mixture)}


# Written by the model.


def test_seeds_of_every_kind() -> None:
    seeds = json.loads((Path(sampling.__file__).parent / "seeds.json").read_text(encoding="utf-8"))
    assert set(seeds) | {"start"} == set(SELF_KINDS)
    for kind, texts in seeds.items():
        assert len(texts) == len(set(texts)) >= 12, kind


def with_template() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_the_chat_template_and_its_special_tokens_are_in_it(tiny_folder: Folder) -> None:
    options: dict[str, Any] = {"model_folder": tiny_folder("llama"), "seqlen": 128}
    chat = calibrate("self-chat", with_template(), **options).tokens
    assert (chat[:, 0] == BOS).all() and (chat == EOS).any()
    some = calibrate("self", with_template(), **options).tokens
    plain = calibrate("self", tiny_tokenizer(), **options).tokens
    # The bytes of the tokenizer are numbered in another order than bytes.
    asked = tiny_tokenizer()("reply:")["input_ids"]
    found = [any(row[i : i + 6] == asked for row in tokens.tolist() for i in range(128)) for tokens in (some, plain)]
    assert found == [True, False]


def test_chat_needs_a_template(tokenizer: Any, tiny_folder: Folder) -> None:
    with pytest.raises(CalibrationError, match="'self-chat' needs a chat template"):
        calibrate("self-chat", tokenizer, model_folder=tiny_folder("llama"))


def test_the_cache_gives_what_the_model_gives_without_one(
    tokenizer: Any, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"model_folder": tiny_folder("llama"), "seqlen": 64}
    whole = calibrate("self", tokenizer, **options).tokens
    monkeypatch.setattr(sampling, "_cache", lambda config, seqlen: sampling.DynamicCache(config=config))
    assert torch.equal(whole, calibrate("self", tokenizer, **options).tokens)
    # A row depends on its number and nothing else, so more rows start with the same ones.
    more = calibrate("self", tokenizer, **{**options, "num_samples": 12}).tokens
    assert torch.equal(more[:8], whole)


def test_sampled_rows_are_kept_and_spoilt_ones_are_not_used(
    tokenizer: Any, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "sampled"
    options: dict[str, Any] = {"model_folder": tiny_folder("llama"), "sampled_folder": kept}
    first = calibrate("self:1,builtin:1", tokenizer, **options)
    (file,) = kept.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_load", lambda *_: pytest.fail("was sampled again"))
        assert calibrate("self:1,builtin:1", tokenizer, **options).fingerprint == first.fingerprint
    content = json.loads(file.read_text())
    content["tokens"][0][0] += 1
    file.write_text(json.dumps(content))
    assert calibrate("self:1,builtin:1", tokenizer, **options).fingerprint == first.fingerprint
    file.write_text("{")
    assert calibrate("self:1,builtin:1", tokenizer, **options).fingerprint == first.fingerprint
    assert calibrate("self:1,builtin:1", tokenizer, **options, seed=1).fingerprint != first.fingerprint


def test_sampling_goes_on_after_the_last_whole_batch(
    tokenizer: Any, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_batch_size", lambda *_: 3)
    asked: list[int] = []
    real = sampling._sample_batch

    def sample_batch(model: Any, rows: Any, *rest: Any) -> torch.Tensor:
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append(len(rows))
        return real(model, rows, *rest)

    monkeypatch.setattr(sampling, "_sample_batch", sample_batch)
    options: dict[str, Any] = {"model_folder": tiny_folder("llama"), "seqlen": 24}
    stop = 99
    whole = calibrate("self", tokenizer, **options).tokens
    assert asked == [3, 3, 2]
    kept, stop = tmp_path / "sampled", 5
    with pytest.raises(KeyboardInterrupt):
        calibrate("self", tokenizer, sampled_folder=kept, **options)
    asked, stop = [], 99
    assert torch.equal(calibrate("self", tokenizer, sampled_folder=kept, **options).tokens, whole)
    assert asked == [2]
    # More rows begin with the same whole batches; the last one, of two rows, would round in another way.
    asked = []
    more = calibrate("self", tokenizer, sampled_folder=kept, **{**options, "num_samples": 10}).tokens
    assert asked == [3, 1] and torch.equal(more[:6], whole[:6])
    # Both requests have all they need now: neither has replaced what the other one ends with.
    asked = []
    for num_samples, rows in ((8, whole), (10, more)):
        again = calibrate("self", tokenizer, sampled_folder=kept, **{**options, "num_samples": num_samples})
        assert torch.equal(again.tokens, rows) and not asked
    # A batch of another size, as another release may have left, is not used.
    asked = []
    monkeypatch.setattr(sampling, "_batch_size", lambda *_: 4)
    for file in kept.iterdir():
        if json.loads(file.read_text())["tokens"][0] == whole[0].tolist():
            file.unlink()
    assert len(calibrate("self", tokenizer, sampled_folder=kept, **options).tokens) == 8 and asked == [4, 4]


@pytest.mark.parametrize("source", SAMPLED)
def test_every_kind_can_be_sampled(tiny_folder: Folder, source: str) -> None:
    tokens = calibrate(source, with_template(), model_folder=tiny_folder("llama"), seqlen=40).tokens
    assert tokens.shape == (8, 40) and len({tuple(row) for row in tokens.tolist()}) == 8


def test_a_dry_run_counts_the_memory_of_sampling(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from intraslice import pruning
    from intraslice.recipes.recipe import load_recipe

    config = AutoConfig.from_pretrained(tiny_folder("llama"))
    # Keys and values of 2 kv heads in each of 3 layers; 10 rows of 16 tokens, then as many as the cache has room for.
    row = 2 * 3 * 2 * config.head_dim * 16 * 4
    assert (config.num_hidden_layers, config.num_key_value_heads) == (3, 2)
    assert sampling.sampling_bytes(config, 1000, 4, 10, 16, torch.device("cpu")) == 4000 + 10 * row
    monkeypatch.setattr(sampling, "_CACHE_BYTES", 3 * row)
    assert sampling.sampling_bytes(config, 1000, 4, 10, 16, torch.device("cpu")) == 4000 + 3 * row

    asked: list[int] = []
    monkeypatch.setattr(pruning, "sampling_bytes", lambda *given: asked.append(given[3]) or 1 << 50)
    flags = {
        "model": str(tiny_folder("llama")),
        "sparsity": 0.3,
        "calibration.num_samples": 8,
        "calibration.seqlen": 16,
    }
    assert pruning.dry_run(load_recipe(None, flags)).estimated_peak_bytes > 1 << 50
    # Half of the default.
    assert asked == [4]
    plain = load_recipe(None, {**flags, "calibration.source": "builtin"})
    assert pruning.dry_run(plain).estimated_peak_bytes < 1 << 50
