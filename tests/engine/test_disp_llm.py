"""DISP-LLM as an allocation: gradients of gates against the stock model, what the training leads to, and its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from intraslice.checkpoint.source import open_checkpoint
from intraslice.errors import RecipeError
from intraslice.methods.blockwise.gate_pass import GatedModel, gate_gradients, learn_gates
from intraslice.methods.blockwise.gates import sampled_gates
from intraslice.methods.blockwise.options import AllocationOptions
from intraslice.placement import Placement
from intraslice.progress import SilentProgress
from intraslice.streaming.model import StreamedModel
from support import prune as support
from support.progress import Notes, StopAt

SIZES: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2}


@pytest.fixture
def streamed(tiny_folder: Callable[..., Path]) -> StreamedModel:
    placement = Placement.choose("cpu", "auto", torch.float32)
    return StreamedModel(open_checkpoint(str(tiny_folder("llama", **SIZES))), placement, (2, 24))


def test_gradients_of_gates_are_those_of_the_stock_model(streamed: StreamedModel, tiny_folder: Callable[..., Path]):
    tokens = support.calibration(2, 24).tokens
    gated = GatedModel(streamed, tokens)
    generator = torch.Generator().manual_seed(0)
    gates = [torch.rand(size, generator=generator).round() for size in (32, 64, 32, 64)]
    found = gate_gradients(gated, tokens, gates, boundary_bytes=1)
    stock, places = support.load(tiny_folder("llama", **SIZES)), []
    for index, layer in enumerate(stock.model.layers):
        basis = gated.gates[index][0].bases
        assert basis is not None
        rotation = torch.block_diag(*basis)
        for linear, turned in ((layer.self_attn.o_proj, rotation), (layer.mlp.down_proj, torch.eye(64))):
            values = gates[len(places)].clone().requires_grad_(True)
            places.append(values)
            linear.register_forward_pre_hook(lambda module, x, q=turned, s=values: ((x[0] @ q * s) @ q.T,))
    stock(tokens, labels=tokens).loss.backward()
    for gradient, values in zip(found, places, strict=True):
        torch.testing.assert_close(gradient, values.grad, atol=1e-5, rtol=1e-3)


def test_training_shuts_the_share_of_gates_that_is_asked_for(streamed: StreamedModel, tmp_path: Path):
    tokens = support.calibration(4, 24).tokens
    logits = learn_gates(
        streamed,
        tokens,
        0.4,
        AllocationOptions(gate_steps=60),
        boundary_bytes=1 << 20,
        save_path=tmp_path / "gates.safetensors",
        progress=SilentProgress(),
    )
    flat = [layer[site].float() for layer in logits for site in ("attention", "ffn")]
    weights = [3072, 6144, 3072, 6144]
    gates = sampled_gates(flat, torch.Generator().manual_seed(99))
    share = sum(float(gate.mean()) * count for gate, count in zip(gates, weights, strict=True)) / sum(weights)
    # Of about 200 gates, under noise.
    assert 0.5 < share < 0.7


def test_the_budget_is_met_and_an_interrupted_training_goes_on(tiny_folder: Callable[..., Path], tmp_path: Path):
    folder, steps = tiny_folder("llama", **SIZES), {"allocation__gate_steps": 24}
    result = support.prune(folder, tmp_path / "whole", "disp-llm", **steps)
    assert abs(result.sparsity - 0.3) < 0.005
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(KeyboardInterrupt):
        # Twenty steps are saved.
        support.prune(folder, tmp_path / "out", "disp-llm", progress=StopAt("gates", 22), **steps)
    notes = Notes()
    support.prune(folder, tmp_path / "out", "disp-llm", resume=True, progress=notes, **steps)
    assert not any("again" in note for note in notes.notes)
    whole, resumed = (support.weights_of(tmp_path / name) for name in ("whole", "out"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_model_that_does_not_fit_is_refused(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Placement, "free_bytes", lambda self: 50_000)
    with pytest.raises(RecipeError, match="keeps all layers in memory, which take 0.0 GB.*take another rule"):
        support.prune(tiny_folder("llama", **SIZES), tmp_path / "out", "disp-llm")
    assert not list(tmp_path.glob("out*"))
