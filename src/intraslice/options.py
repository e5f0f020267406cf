"""Options that every method has: the calibration text, and where and how the work is done. No torch.

The options of a method are in its own folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

MAX_SPARSITY = 0.95
"""Sparsities are below this."""

MAX_SEED = (1 << 63) - 1
"""Seeds are numbers of 63 bits."""

DEFAULT_CALIBRATION = "offline-mix"
"""The text that is taken where none is named; the only place that says which one it is."""


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Which text the statistics are collected on.

    Attributes:
        source: name of a text, a file, or several of them with weights (`a:0.5,b:0.5`); see `data.mixture`.
        num_samples: number of token sequences.
        seqlen: tokens in a sequence.
        seed: of the choice of sequences, and of the sampling for "self".
        text_field: the column of a .jsonl or .parquet file that holds the text.
    """

    __pydantic_config__ = {"extra": "forbid"}

    source: str = DEFAULT_CALIBRATION
    num_samples: Annotated[int, Ge(1), Le(1 << 24)] = 128
    seqlen: Annotated[int, Ge(2), Le(1 << 24)] = 2048
    seed: Annotated[int, Ge(0), Le(MAX_SEED)] = 0
    text_field: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Execution settings. They change neither method nor budget; some change the weights by rounding.

    Attributes:
        device: "auto", "cpu" or a torch device string.
        dtype: dtype of the saved weights: "auto" keeps the checkpoint's, or "float32", "bfloat16", "float16".
        matmul: "exact" computes the float32 statistics exactly and only the gradient pass, which ranks, with products
            rounded to bfloat16 where that is faster; "fast" rounds both; "exact-gradients" rounds nothing.
        batch_tokens: tokens in one forward batch (at least one sequence).
        boundary_bytes: memory for the layer-boundary states of the gradient pass; smaller means more passes.
        hidden_states: "memory" or "disk" for the hidden states between layers.
        max_shard_bytes: largest weight file of the checkpoint.
        gradient_folder: keeps gradient passes, so that another sparsity or ablation of the same model, calibration and
            batch size does not repeat them; "" keeps none.
    """

    __pydantic_config__ = {"extra": "forbid"}

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    matmul: Literal["exact", "fast", "exact-gradients"] = "exact"
    batch_tokens: Annotated[int, Ge(1)] = 2048
    boundary_bytes: Annotated[int, Ge(1)] = 1 << 29
    hidden_states: Literal["memory", "disk"] = "memory"
    max_shard_bytes: Annotated[int, Ge(1 << 20)] = 1 << 30
    gradient_folder: str = ""
