"""What `--method` and `--target` stand for: named overrides of the options' defaults."""

from __future__ import annotations

from typing import Any

_NO_CORRECTION = {"pca_attention": False, "pca_ffn": False}

METHODS: dict[str, dict[str, Any]] = {
    "intraslice": {},
    "iter-pca": {"ffn": {"iter_pca": True}},
    "ada-h": {"allocation": _NO_CORRECTION},
    "naive": {"allocation": _NO_CORRECTION, "attention": {"adaptive_heads": False}},
    "wanda-sp": {
        "allocation": {"name": "uniform", "ffn_bias": 1.0, "count": "units"},
        "attention": {"score": "norm", "adaptive_heads": False, "repair": "none", "target": "block"},
        "ffn": {"score": "norm", "repair": "none", "target": "block"},
    },
    "flap": {
        "allocation": {"name": "fluctuation", "count": "units"},
        "attention": {"score": "fluctuation", "adaptive_heads": False, "repair": "bias", "target": "block"},
        "ffn": {"score": "fluctuation", "repair": "bias", "target": "block"},
    },
    "slimllm": {
        "allocation": {"name": "similarity", "ffn_bias": 1.0, "count": "units"},
        "attention": {"score": "pearson", "adaptive_heads": False, "repair": "affine", "target": "block"},
        "ffn": {"score": "feature", "repair": "affine", "target": "block"},
    },
    "transact": {
        "allocation": {"name": "uniform", "ffn_bias": 1.0},
        "attention": {"keep_heads": True, "basis": "channels", "repair": "none", "target": "block"},
        "ffn": {"score": "magnitude", "repair": "none", "target": "block"},
    },
    "sobp": {
        "allocation": {"name": "head_search", "count": "units"},
        "attention": {"score": "obs", "adaptive_heads": False, "damping": 0.01, "target": "block"},
        "ffn": {"score": "obs", "damping": 0.01, "target": "block"},
    },
    "paper": {
        "allocation": {"ffn_bias": 1.0},
        "attention": {"shrink_to": "zero", "damping": 0.01, "target": "block"},
        "ffn": {"shrink_to": "zero", "damping": 0.01, "target": "block", "iter_pca": True},
    },
    "svd-llm": {"architecture": "factors"},
    "slicegpt": {"architecture": "residual"},
}
"""Presets as overrides of the options' defaults: the default method, the ablations of the paper's Table 4 (with
IPca, without Pca-A, without Ada-H as well), other methods as compositions of the same parts, and the paper's equations
to the letter.

The other methods differ from their publications where a fair comparison asks for it: the budget counts stored weights,
statistics of a layer come from the layers pruned before it, query heads of a kv head go one by one (allocation.count),
and nobody trains afterwards. TransAct prunes in several rounds; within a layer they would change nothing here, because
q, k, v and act depend on the layer's input only, and that is measured anew for every layer."""


TARGETS: dict[str, dict[str, Any]] = {
    "transformers": {},
    # Attention kernels take multiples of 8 or 16 up to 256; 32 channels suit every matrix kernel.
    "vllm": {
        "allocation": {"shapes": "layer"},
        "attention": {"head_multiple": 16},
        "ffn": {"ffn_multiple": 32},
    },
    # Quantised rows are made of blocks of 32 weights, K-quants of 256.
    "llama.cpp": {
        "allocation": {"shapes": "width"},
        "attention": {"head_multiple": 16, "context_multiple": 32},
        "ffn": {"ffn_multiple": 256},
    },
    "stock": {"allocation": {"shapes": "model"}, "attention": {"head_multiple": 8}},
}
"""Where the model will run, as overrides of the options' defaults: shapes that the runtime runs well."""
