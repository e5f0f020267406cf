"""Products in bfloat16, which processors with instructions for them take faster."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from intraslice.healing.loss import Distillation
from support.progress import StopAt


def test_bfloat16_products_train_the_same_float32_weights(pruned_folder, heal, tmp_path):
    exact = heal(pruned_folder(), output=tmp_path / "exact").record.curve
    rounded = heal(pruned_folder(), precision="bfloat16").record.curve
    # bfloat16 has 8 bits: 0.4 % for each product, and what adds up of it in three layers.
    assert exact[0].kl != rounded[0].kl and abs(rounded[0].kl / exact[0].kl - 1) < 0.1
    assert rounded[-1].kl < rounded[0].kl
    before = load_file(pruned_folder() / "model.safetensors")
    after = load_file(tmp_path / "healed" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
    assert after["model.layers.0.mlp.down_proj.weight"].dtype is torch.float32


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_budget_of_time_is_planned_with_the_products_of_the_training(precision, pruned_folder, heal, monkeypatch):
    rounded: dict[str, list[bool]] = {"loss": [], "held_out": []}

    def watched(name: str):
        function = getattr(Distillation, name)

        def call(*arguments, **named):
            rounded[name].append(torch.is_autocast_enabled("cpu"))
            return function(*arguments, **named)

        return call

    for name in rounded:
        monkeypatch.setattr(Distillation, name, watched(name))
    with pytest.raises(KeyboardInterrupt):
        heal(pruned_folder(), precision=precision, budget="10min", progress=StopAt("healing (tokens)", 0))
    # Two steps and a measurement for the plan, one of each in the training.
    rounds = precision == "bfloat16"
    assert rounded == {"loss": [rounds] * 3, "held_out": [rounds] * 2}
