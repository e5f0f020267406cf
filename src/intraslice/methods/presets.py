"""What `--method` and `--target` stand for: named option sets. No torch.

The other methods follow the code of their authors: what is scored, on which inputs (measured_on), and how much each
layer loses. They differ where a fair comparison asks for it: the budget counts stored weights, and nobody trains
afterwards. None of these codes knows grouped queries. With Wanda a kv head goes with all its query heads; with the
others the query heads of a kv head go one by one (allocation.budget_unit). TransAct prunes in several rounds; within a
layer they would change nothing here, because q, k, v and act depend on the layer's input only, and that is measured
anew for every layer.
"""

from __future__ import annotations

from typing import Any

_NO_CORRECTION = {"pca_attention": False, "pca_ffn": False}

_HALF_THE_DRIFT: dict[str, Any] = {
    "attention": {"drift_share": 0.5},
    "ffn": {"drift_share": 0.5, "damping_scale": "channel", "damping": 0.3},
}

INTRASLICE: dict[str, Any] = {}
INTRASLICE_EFFORTS: dict[str, dict[str, Any]] = {
    "low": {},
    "medium": {**_HALF_THE_DRIFT, "tune": {"sites": "all"}},
    "high": {**_HALF_THE_DRIFT, "distill": {"sites": "all"}, "tune": {"sites": "all", "epochs": 3.0}},
}
"""How much time the default method takes, least first; the other methods have one way to run. docs/research.md has what
each part was measured to be worth."""
DEFAULT_EFFORT = "medium"
ITER_PCA = {"ffn": {"iter_pca": True}}
ADA_H = {"allocation": _NO_CORRECTION}
NAIVE = {"allocation": _NO_CORRECTION, "attention": {"heads": "whole"}}
WANDA_SP = {
    "allocation": {"rule": "uniform", "ffn_share": 1.0, "budget_unit": "groups"},
    "attention": {
        "score": "norm",
        "heads": "whole",
        "gqa_groups": "whole",
        "repair": "none",
        "repair_against": "own_output",
    },
    "ffn": {"score": "norm", "measured_on": "dense_layer", "repair": "none", "repair_against": "own_output"},
}
FLAP = {
    "allocation": {"rule": "fluctuation", "budget_unit": "units", "max_site_sparsity": 0.99},
    "attention": {
        "score": "fluctuation",
        "heads": "whole",
        "measured_on": "dense_stream",
        "repair": "bias",
        "repair_against": "own_output",
    },
    "ffn": {
        "score": "fluctuation",
        "measured_on": "dense_stream",
        "repair": "bias",
        "repair_against": "own_output",
    },
}
SLIMLLM = {
    "allocation": {"rule": "similarity", "ffn_share": 1.0, "budget_unit": "units"},
    "attention": {"score": "pearson", "heads": "whole", "repair": "affine", "repair_against": "own_output"},
    "ffn": {"score": "feature", "repair": "affine", "repair_against": "own_output"},
}
TRANSACT = {
    "allocation": {"rule": "uniform", "ffn_share": 1.0},
    "attention": {"heads": "all", "basis": "channels", "repair": "none", "repair_against": "own_output"},
    "ffn": {"score": "magnitude", "repair": "none", "repair_against": "own_output"},
}
SOBP = {
    "allocation": {"rule": "head_search", "budget_unit": "units", "max_site_sparsity": 0.8},
    "attention": {
        "score": "obs",
        "obs_damping": 0.01,
        "heads": "whole",
        "damping": 0.01,
        "repair_against": "own_output",
    },
    "ffn": {"score": "obs", "obs_damping": 0.01, "damping": 0.01, "repair_against": "own_output"},
}
MODEGPT = {
    "allocation": {"rule": "similarity", "ffn_share": 1.0, "kept_layers": 0.0, "similarity_scale": 10.0},
    "attention": {
        "heads": "all",
        "basis": "output",
        "pair_score": "energy",
        "measured_on": "dense_stream",
        "repair": "none",
        "repair_against": "own_output",
    },
    "ffn": {
        "score": "leverage",
        "obs_damping": 0.01,
        "measured_on": "dense_stream",
        "repair": "ridge",
        "shrink_to": "zero",
        "damping": 0.0001,
        "repair_against": "own_output",
    },
}
LLM_PRUNER = {
    "allocation": {"rule": "inner", "ffn_share": 1.0, "budget_unit": "groups"},
    "attention": {
        "score": "taylor",
        "heads": "whole",
        "gqa_groups": "whole",
        "repair": "none",
        "repair_against": "own_output",
    },
    "ffn": {"score": "taylor", "repair": "none", "repair_against": "own_output"},
}
LLM_SURGEON = {
    "allocation": {"rule": "curvature", "budget_unit": "units", "max_site_sparsity": 0.99},
    "attention": {
        "score": "curvature",
        "obs_damping": 0.01,
        "heads": "whole",
        "measured_on": "dense_stream",
        "damping": 0.01,
        "repair_against": "own_output",
    },
    "ffn": {
        "score": "curvature",
        "obs_damping": 0.01,
        "measured_on": "dense_stream",
        "damping": 0.01,
        "repair_against": "own_output",
    },
}
DISP_LLM = {"allocation": {"rule": "gates"}}
TYR = {
    "allocation": {"rule": "search", "ffn_share": 1.0},
    "attention": {
        "score": "obs",
        "obs_damping": 0.01,
        "heads": "whole",
        "shrink_to": "zero",
        "damping": 0.01,
        "repair_against": "own_output",
    },
    "ffn": {
        "score": "obs",
        "obs_damping": 0.01,
        "shrink_to": "zero",
        "damping": 0.01,
        "repair_against": "own_output",
    },
}
PAPER = {
    "allocation": {"ffn_share": 1.0},
    "attention": {
        "head_multiple": 2,
        "head_budget": "queries",
        "removal_order": "score",
        "shrink_to": "zero",
        "damping": 0.01,
        "repair_against": "own_output",
    },
    "ffn": {"shrink_to": "zero", "damping": 0.01, "repair_against": "own_output", "iter_pca": True},
}

TARGETS: dict[str, dict[str, Any]] = {
    "transformers": {},
    # Attention kernels take multiples of 8 or 16 up to 256; 32 channels suit every matrix kernel.
    "vllm": {
        "allocation": {"shape_freedom": "layer"},
        "attention": {"head_multiple": 16},
        "ffn": {"ffn_multiple": 32},
    },
    # Quantized rows are made of groups of 32 weights, K-quants of 256.
    "llama.cpp": {
        "allocation": {"shape_freedom": "width"},
        "attention": {"head_multiple": 16, "context_multiple": 32},
        "ffn": {"ffn_multiple": 256},
    },
    "stock": {"allocation": {"shape_freedom": "model"}, "attention": {"head_multiple": 8}},
}
"""Where the model will run, as overrides of the options' defaults: shapes that the runtime runs well. A method takes of
them what it reads."""
