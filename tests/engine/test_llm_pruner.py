"""LLM-Pruner: the importance of all weights of a unit, by brute force, and what is kept by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support import prune as support

SIZES: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}


def taylor_of(model: Any, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what the kv heads (with their query heads) and the channels of each layer are worth."""
    for row in tokens:
        # The sum over the sequences of the mean loss of a token.
        model(row[None], labels=row[None]).loss.backward()
    found = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        size = {
            name: (linear.weight * linear.weight.grad).abs().detach()
            for module in (attention, mlp)
            for name, linear in module.named_children()
            if isinstance(linear, torch.nn.Linear)
        }
        heads = torch.stack(
            [
                size["q_proj"][8 * kv : 8 * kv + 8].sum()
                + size["k_proj"][4 * kv : 4 * kv + 4].sum()
                + size["v_proj"][4 * kv : 4 * kv + 4].sum()
                + size["o_proj"][:, 8 * kv : 8 * kv + 8].sum()
                for kv in range(4)
            ]
        )
        channels = size["up_proj"].sum(1) + size["gate_proj"].sum(1) + size["down_proj"].sum(0)
        found.append((heads, channels))
    return found


@pytest.mark.parametrize("boundary_bytes", [1, 1 << 20])
def test_the_least_important_groups_and_channels_go_and_outer_layers_stay(
    boundary_bytes: int, tiny_folder: Callable[..., Path], tmp_path: Path
):
    folder, on = tiny_folder("llama", **SIZES), support.calibration(4, 24)
    result = support.prune(
        folder,
        tmp_path / "out",
        "llm-pruner",
        on=on,
        allocation__kept_first=0.25,
        allocation__kept_last=0.0,
        run__boundary_bytes=boundary_bytes,
    )
    assert abs(result.sparsity - 0.3) < 0.005
    dense, pruned = support.load(folder), support.load(tmp_path / "out")
    scores = taylor_of(dense, on.tokens)
    first, *others = result.layers
    assert (first.shape.num_attention_heads, first.shape.intermediate_size) == (8, 64)
    for index, record in enumerate(others, start=1):
        heads, channels = scores[index]
        # 0.3 of four layers is 0.4 of three: int(0.4 * 4) kv heads.
        best = heads.topk(3).indices.sort().values.tolist()
        assert record.heads == tuple(2 * kv + i for kv in best for i in range(2))
        mlp, full = pruned.model.layers[index].mlp, dense.model.layers[index].mlp
        kept = [torch.cdist(row[None], full.up_proj.weight).argmin().item() for row in mlp.up_proj.weight]
        assert sorted(kept) == channels.topk(len(kept)).indices.sort().values.tolist()
        # Nothing is repaired.
        assert torch.equal(mlp.down_proj.weight, full.down_proj.weight[:, kept])


def test_an_interrupted_run_takes_the_scores_of_its_plan(tiny_folder: Callable[..., Path], tmp_path: Path):
    from support.progress import StopAt

    folder = tiny_folder("opt", num_attention_heads=8, num_hidden_layers=3)
    support.prune(folder, tmp_path / "whole", "llm-pruner")
    with pytest.raises(KeyboardInterrupt):
        support.prune(folder, tmp_path / "out", "llm-pruner", progress=StopAt("layers", 0))
    support.prune(folder, tmp_path / "out", "llm-pruner", resume=True)
    whole, resumed = (support.weights_of(tmp_path / name) for name in ("whole", "out"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
