"""How and where a run does its work; the options of a method are in its own folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how the work is done; never changes what is asked for.

    Attributes:
        device: "auto", "cpu" or a torch device string.
        dtype: dtype of the saved weights: "auto" keeps the checkpoint's, or "float32", "bfloat16", "float16".
        matmul: "exact" computes the float32 statistics exactly and only the gradient pass, which ranks, with products
            rounded to bfloat16 where that is faster; "fast" rounds both; "exact-gradients" rounds nothing.
        batch_tokens: tokens in one forward batch (at least one sequence).
        boundary_bytes: memory for the layer-boundary states of the gradient pass; smaller means more passes.
        hidden_states: "memory" or "disk" for the hidden states between layers.
        max_shard_bytes: largest weight file of the checkpoint.
        scan_folder: keeps gradient passes, so that another sparsity or ablation of the same model, calibration and
            batch size does not repeat them; "" keeps none.
    """

    __pydantic_config__ = {"extra": "forbid"}

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    matmul: Literal["exact", "fast", "exact-gradients"] = "exact"
    batch_tokens: int = 2048
    boundary_bytes: int = 1 << 29
    hidden_states: Literal["memory", "disk"] = "memory"
    max_shard_bytes: int = 1 << 30
    scan_folder: str = ""
