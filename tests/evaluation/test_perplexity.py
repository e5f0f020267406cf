from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from intraslice.data.windows import token_stream
from intraslice.errors import CalibrationError, NumericalError, RecipeError
from intraslice.evaluation import perplexity
from intraslice.evaluation.perplexity import measure_perplexity, select_windows
from support.tiny import FAMILIES, VOCAB_SIZE, tiny_model


def stream(length: int) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_loss_of_the_stock_class(family: str):
    model = tiny_model(family)
    tokens = stream(5 * 24 + 7)
    windows = tokens[: 5 * 24].view(5, 24)
    with torch.no_grad():
        # HF's own loss: the mean over the 23 predicted tokens of each window.
        expected = sum(float(model(input_ids=w[None], labels=w[None]).loss) for w in windows) / 5
    result = measure_perplexity(model, tokens, seqlen=24)
    assert (result.num_windows, result.num_tokens) == (5, 5 * 23)
    assert result.mean_nll == pytest.approx(expected, rel=1e-6)  # float32 sums in another order
    assert result.perplexity == pytest.approx(math.exp(result.mean_nll))


def test_chunks_of_positions_change_nothing(monkeypatch: pytest.MonkeyPatch):
    model, tokens = tiny_model("llama"), stream(100)
    whole = measure_perplexity(model, tokens, seqlen=50).mean_nll
    monkeypatch.setattr(perplexity, "CHUNK_POSITIONS", 7)
    assert measure_perplexity(model, tokens, seqlen=50).mean_nll == pytest.approx(whole, rel=1e-6)


def test_other_architectures_go_through_their_own_head():
    # Granite divides its logits after the head; slices through the head alone would be wrong.
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        logits_scaling=3.0,
    )
    model = GraniteForCausalLM(config).eval()
    tokens = stream(48)
    with torch.no_grad():
        expected = float(model(input_ids=tokens[None], labels=tokens[None]).loss)
    assert measure_perplexity(model, tokens, seqlen=48).mean_nll == pytest.approx(expected, rel=1e-6)


def test_windows_are_a_limit():
    model, tokens = tiny_model("llama"), stream(100)
    first = measure_perplexity(model, tokens, seqlen=20, windows=2)
    assert first.num_windows == 2
    assert first.mean_nll == measure_perplexity(model, tokens[:40], seqlen=20).mean_nll
    assert measure_perplexity(model, tokens, seqlen=20, windows=99).num_windows == 5


def test_half_precision_is_summed_in_float():
    model = tiny_model("llama", dtype=torch.bfloat16)
    exact = measure_perplexity(tiny_model("llama"), stream(128), seqlen=64).mean_nll
    # 8 bits of mantissa in weights and activations.
    assert measure_perplexity(model, stream(128), seqlen=64).mean_nll == pytest.approx(exact, rel=0.02)


def test_the_whole_text_is_one_stream(tokenizer):
    text = "one line\nand another\n"
    assert token_stream(text, tokenizer).tolist() == tokenizer(text)["input_ids"]


def test_wrong_input():
    model = tiny_model("llama")
    with pytest.raises(CalibrationError, match="10 tokens, less than one window of 20"):
        measure_perplexity(model, stream(10), seqlen=20)
    with pytest.raises(RecipeError, match="128 positions"):
        measure_perplexity(model, stream(500), seqlen=256)
    with pytest.raises(RecipeError, match="at least 2"):
        measure_perplexity(model, stream(50), seqlen=1)
    with pytest.raises(RecipeError, match="at least 1"):
        measure_perplexity(model, stream(50), seqlen=10, windows=0)
    with pytest.raises(CalibrationError, match=f"token id {VOCAB_SIZE}"):
        measure_perplexity(model, torch.full((50,), VOCAB_SIZE), seqlen=10)


def test_not_finite():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="window 0"):
        measure_perplexity(model, stream(50), seqlen=10)


def test_api_evaluates_a_text_file(tiny_folder, tmp_path: Path):
    from intraslice import api
    from intraslice.loading import load_model

    text = "The quick brown fox jumps over the lazy dog. " * 20
    path = tmp_path / "text.txt"
    path.write_text(text)
    folder = tiny_folder("llama")
    model, tokenizer = load_model(str(folder))
    expected = measure_perplexity(model, token_stream(text, tokenizer), seqlen=64, windows=3)
    result = api.evaluate(folder, text=str(path), seqlen=64, windows=3)
    assert result.mean_nll == expected.mean_nll


def test_windows_of_models_that_need_it_begin_with_bos():
    from transformers import AutoConfig

    tokens = torch.arange(10, 20)
    needs = AutoConfig.for_model("gemma3_text", vocab_size=64, bos_token_id=2)
    assert select_windows(needs, tokens, 5, None).tolist() == [[2, 11, 12, 13, 14], [2, 16, 17, 18, 19]]
    assert tokens.tolist() == list(range(10, 20))
    plain = AutoConfig.for_model("llama", vocab_size=64, bos_token_id=2)
    assert select_windows(plain, tokens, 5, None).flatten().tolist() == tokens.tolist()
