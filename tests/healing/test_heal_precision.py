"""Products in bfloat16, which processors with instructions for them take faster."""

from __future__ import annotations

import torch
from safetensors.torch import load_file


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
