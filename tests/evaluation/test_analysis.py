from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from intraslice.api import analyse, analyze
from intraslice.checkpoint.source import open_checkpoint
from intraslice.errors import NumericalError, RecipeError
from intraslice.runtime.configuration_intraslice import pruned_config
from intraslice.runtime.families_intraslice import FAMILIES, LayerShape
from intraslice.streaming.analysis import (
    analyze_model,
    effective_rank,
    effective_ranks,
    pair_masks,
    sample_spectrum,
)
from support.tiny import VOCAB_SIZE, make_tiny, tiny_config

HALF_ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
CASES = [
    ("llama", {}),
    ("phi3", {"rope_parameters": HALF_ROPE, "sliding_window": 6}),
    ("opt", {}),
    ("opt", {"do_layer_norm_before": False}),
]


def token_rows(rows: int = 3, length: int = 20) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(3))


def spectrum_of(x: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of x^T x from the singular values of x itself."""
    values = torch.linalg.svdvals(x.double()).square()
    return torch.nn.functional.pad(values, (0, x.shape[1] - len(values)))


def brute_rank(values: torch.Tensor) -> int:
    for count in range(len(values) + 1):
        if float(values[:count].sum()) >= 0.99 * float(values.sum()):
            return count
    raise AssertionError


def test_effective_rank_counts_what_holds_99_percent():
    values = torch.tensor([[98.0, 1.0, 0.5, 0.5], [25.0, 25.0, 25.0, 25.0], [99.5, 0.5, 0.0, 0.0], [0.0] * 4])
    assert effective_rank(values).tolist() == [2, 4, 1, 0]
    random = torch.rand(7, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 8
    random = random.sort(-1, descending=True).values
    assert effective_rank(random).tolist() == [brute_rank(row) for row in random]


def test_spectrum_is_normalised_and_sampled_evenly():
    assert sample_spectrum(torch.tensor([3.0, 1.0])) == [0.75, 0.25]
    sampled = sample_spectrum(torch.arange(127, 0, -1).double())
    # Every second rank of 127, the first and the last among them.
    assert sampled == pytest.approx([(127 - 2 * k) / (127 * 64) for k in range(64)])
    assert sample_spectrum(torch.zeros(3)) == [0.0, 0.0, 0.0]


def test_masks_keep_both_channels_of_the_best_pairs_of_each_kv_head():
    pairs = torch.tensor([[0, 3], [1, 4], [2, 5]])
    masks = pair_masks(torch.tensor([[1.0, 3.0, 2.0], [9.0, 1.0, 2.0]]), pairs, 2)
    assert masks.tolist() == [[0, 1, 1, 0, 1, 1], [1, 0, 1, 1, 0, 1]]


@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_streamed_numbers_are_those_of_stored_activations(family: str, overrides: dict, tmp_path: Path):
    folder = make_tiny(family, tmp_path / "m", dtype=torch.float64, **overrides)
    rows = token_rows()
    stored: dict[str, list[torch.Tensor]] = {}
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    def keep(name: str, x: Any) -> None:
        x = x[0] if isinstance(x, tuple) else x
        stored.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]))

    for index, layer in enumerate(stock.get_decoder().layers):
        is_opt = family == "opt"
        o = layer.self_attn.out_proj if is_opt else layer.self_attn.o_proj
        down = layer.fc2 if is_opt else layer.mlp.down_proj
        o.register_forward_pre_hook(lambda module, args, i=index: keep(f"context{i}", args))
        o.register_forward_hook(lambda module, args, output, i=index: keep(f"attention_output{i}", output))
        down.register_forward_pre_hook(lambda module, args, i=index: keep(f"act{i}", args))
        down.register_forward_hook(lambda module, args, output, i=index: keep(f"ffn_output{i}", output))
        layer.register_forward_hook(lambda module, args, output, i=index: keep(f"residual{i}", output))
    with torch.no_grad():
        for row in rows:
            stock(row[None])

    result = analyze_model(open_checkpoint(str(folder)), rows, device="cpu")
    assert json.loads(json.dumps(result)) == result
    assert (result["num_tokens"], result["hidden_size"], result["head_dim"]) == (60, 32, 8)
    assert result["intermediate_size"] == 64
    ranks = result["effective_rank"]
    for index in range(3):
        whole = {name: torch.cat(stored[f"{name}{index}"]) for name in ranks}
        for name in ("act", "attention_output", "ffn_output", "residual"):
            assert ranks[name][index] == brute_rank(spectrum_of(whole[name])), (name, index)
        heads = [spectrum_of(whole["context"][:, 8 * head : 8 * head + 8]) for head in range(4)]
        assert ranks["context"][index] == sum(map(brute_rank, heads)) / 4
        mean = sum(values / values.sum() for values in heads) / 4
        assert result["context_spectrum"][index] == pytest.approx(mean.tolist(), abs=1e-9)
        for name in ("act", "residual"):
            values = spectrum_of(whole[name])
            assert result[f"{name}_spectrum"][index] == pytest.approx((values / values.sum()).tolist(), abs=1e-9)
    assert (result["rope_pairs"] is None) == (family == "opt")


def test_rope_pair_errors_are_those_of_the_stock_class_without_the_pairs(tmp_path: Path, monkeypatch):
    """The pairs are ranked over all pairs of tokens by hand, and dropped by zero rows in the stock q_proj."""
    folder = make_tiny("llama", tmp_path / "m", dtype=torch.float64, head_dim=16)
    rows, layer = token_rows(), 1
    stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    rotated: list[tuple[torch.Tensor, torch.Tensor]] = []
    rotate = modeling_llama.apply_rotary_pos_emb

    def record(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rotated.append(rotate(*args, **kwargs))
        return rotated[-1]

    contexts: list[torch.Tensor] = []
    attention = stock.model.layers[layer].self_attn
    attention.o_proj.register_forward_pre_hook(lambda module, args: contexts.append(args[0].flatten(0, 1)))

    def run() -> torch.Tensor:
        contexts.clear()
        with torch.no_grad():
            for row in rows:
                stock(row[None])
        return torch.cat(contexts).view(-1, 4, 16)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", record)
    dense = run()
    query = torch.cat([q for q, _ in rotated[layer::3]], 2)[0]  # [4, 60, 16]
    key = torch.cat([k for _, k in rotated[layer::3]], 2)[0]  # [2, 60, 16]
    weight = attention.q_proj.weight.detach().clone()
    expected = []
    for kept in (8, 6, 2):
        attention.q_proj.weight.data.copy_(weight)
        for kv in range(2):
            products = [(query[head, :, None] * key[kv, None]).abs().mean((0, 1)) for head in (2 * kv, 2 * kv + 1)]
            channels = products[0] + products[1]
            worst = (channels[:8] + channels[8:]).argsort()[: 8 - kept].tolist()
            for head in (2 * kv, 2 * kv + 1):
                for pair in worst:
                    attention.q_proj.weight.data[16 * head + pair] = 0
                    attention.q_proj.weight.data[16 * head + pair + 8] = 0
        changed = run()
        expected.append(float(((dense - changed).norm(dim=(0, 2)) / dense.norm(dim=(0, 2))).mean()))

    result = analyze_model(open_checkpoint(str(folder)), rows, kept_fractions=(1.0, 0.75, 0.25), device="cpu")[
        "rope_pairs"
    ]
    assert result["kept_fraction"] == [1.0, 0.75, 0.25]
    assert result["relative_error"][layer] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert 0 == expected[0] < expected[1] < expected[2]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_effective_ranks_of_dense_and_pruned_models(family: str, tiny_folder):
    rows, config = token_rows(), tiny_config(family)
    folder = tiny_folder(family)
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (
        effective_ranks(dense, rows)
        == analyze_model(open_checkpoint(str(folder)), rows, device="cpu")["effective_rank"]["residual"]
    )
    shape = LayerShape(heads_per_kv=(1, 1), qk_head_dim=6, v_head_dim=5, intermediate_size=24)
    layout = pruned_config(config, FAMILIES[family], [shape] * 3, method="random", recipe={})
    torch.manual_seed(0)
    pruned = AutoModelForCausalLM.from_config(layout).eval()
    for parameter in pruned.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    # Hugging Face gives the last hidden states after the final norm: they are not compared.
    with torch.no_grad():
        states = [pruned(row[None], output_hidden_states=True).hidden_states for row in rows]
    expected = [brute_rank(spectrum_of(torch.cat([part[index][0] for part in states]))) for index in (1, 2)]
    hooks = [len(layer._forward_hooks) for layer in pruned.get_decoder().layers]  # some are transformers' own
    ranks = effective_ranks(pruned, rows)
    assert len(ranks) == 3 and ranks[:2] == expected
    assert [len(layer._forward_hooks) for layer in pruned.get_decoder().layers] == hooks


def test_the_function_for_users_reads_a_text(tiny_folder, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(600)))
    result = analyze(str(tiny_folder("llama")), text=str(text), num_samples=3, seqlen=32, device="cpu")
    assert result["num_tokens"] == 96
    assert [len(result["effective_rank"][name]) for name in ("context", "residual")] == [3, 3]
    with pytest.raises(RecipeError, match="seqlen 256 is beyond the 128 positions"):
        analyze(str(tiny_folder("llama")), text=str(text), seqlen=256)
    with pytest.warns(DeprecationWarning, match="analyze"):
        same = analyse(str(tiny_folder("llama")), text=str(text), num_samples=3, seqlen=32, device="cpu")
    assert same == result


def test_infinite_activations_name_the_layer(tmp_path: Path):
    folder = make_tiny("llama", tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e38
    weights["model.layers.1.mlp.gate_proj.weight"] *= 1e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="layer 1: the activations"):
        analyze_model(open_checkpoint(str(folder)), token_rows(), device="cpu")
    with pytest.raises(NumericalError, match="layer 1: the activations"):
        effective_ranks(AutoModelForCausalLM.from_pretrained(folder).eval(), token_rows())
