"""Folders of random pruned models, as the exporters read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from intraslice import api
from intraslice.runtime.configuration_intraslice import dense_shape, pruned_config
from intraslice.runtime.families_intraslice import FAMILIES, LayerShape
from intraslice.runtime.modeling_intraslice import PrunedAttention
from support.family_cases import family_model
from support.tiny import tiny_config, tiny_tokenizer
from support.tiny_models import dense_config_of, randomise

FREE = [
    LayerShape(heads_per_kv=(2, 2), qk_head_dim=8, v_head_dim=8, intermediate_size=40),
    LayerShape(heads_per_kv=(1, 1), qk_head_dim=8, v_head_dim=8, intermediate_size=64),
    LayerShape(heads_per_kv=(3,), qk_head_dim=8, v_head_dim=8, intermediate_size=9),
]
"""Whole heads of the tiny models, another number of them in each layer."""


def save(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    """Save a model with a tokenizer: single bytes unless another one is given."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def save_pruned(
    folder: Path,
    family: str = "llama",
    shapes: Sequence[LayerShape] = FREE,
    *,
    pairs: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    dense: Any = None,
    **overrides: Any,
) -> Path:
    """Save a random pruned model of these layers; every head keeps `pairs`, or pairs of its own.

    The dense config is that of the tiny model of the family, with `overrides`, unless `dense` is given.
    """
    dense = dense or tiny_config(family, num_hidden_layers=len(shapes), **overrides)
    num_pairs = dense_shape(dense, FAMILIES[family]).qk_head_dim // 2
    config = pruned_config(dense, FAMILIES[family], shapes, method="random", recipe={})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=1.5 * max(parameter.shape[1], 1) ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        for module in model.modules():
            if isinstance(module, PrunedAttention) and module.rope_index is not None:
                kept, heads = module.rope_index.shape[1], module.num_kv_heads
                own = torch.stack([torch.randperm(num_pairs)[:kept] for _ in range(heads)])
                module.set_rope_pairs(own if pairs is None else torch.tensor(pairs).repeat(heads, 1))
    return save(model.to(dtype), folder, tokenizer)


def save_uniform(
    case: str, folder: Path, *, width: int, heads: int = 2, kv: int = 1, ffn: int = 40, biases=False, **overrides: Any
) -> Path:
    """Save a random pruned model with one shape, whose heads share a random choice of rotary pairs."""
    dense = dense_config_of(case, **overrides)
    spec = FAMILIES[dense.model_type]
    shape = LayerShape(
        heads_per_kv=(heads // kv,) * kv,
        qk_head_dim=width,
        v_head_dim=width,
        intermediate_size=ffn,
        output_bias=biases,
    )
    config = pruned_config(dense, spec, [shape] * dense.num_hidden_layers, method="random", recipe={})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model)
    pairs = torch.randperm(dense_shape(dense, spec).qk_head_dim // 2, generator=torch.Generator().manual_seed(3))
    for module in model.modules():
        if isinstance(module, PrunedAttention) and module.rope_index is not None:
            module.set_rope_pairs(pairs[: width // 2].sort().values.repeat(kv, 1))
    return save(model, folder)


def prune_family(
    family: str, folder: Path, target: str = "transformers", *, sparsity: float = 0.3, more: Any = None, **config: Any
) -> Path:
    """Prune the case of a family by the default method; return the folder, with the dense one beside it.

    Args:
        family: or one of its cases.
        folder: where both go.
        target: runtime that the shapes are chosen for.
        sparsity: share of the weights that go.
        more: options of the recipe.
        config: fields of the dense config that are other ones than in the case.
    """
    dense = save(family_model(family, torch.float32, **config), folder / "dense")
    options = {
        "calibration.num_samples": 4,
        "calibration.seqlen": 24,
        "run.device": "cpu",
        "attention.head_multiple": 2,
        "ffn.ffn_multiple": 2,
        **(more or {}),
    }
    api.prune(str(dense), output=folder / "pruned", sparsity=sparsity, target=target, options=options)
    return folder / "pruned"
