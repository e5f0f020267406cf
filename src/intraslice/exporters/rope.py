"""Rotary frequencies of the dense model, for runtimes that take them as constants."""

from __future__ import annotations

import torch
from torch import Tensor

from intraslice.checkpoint.pruned import PrunedCheckpoint
from intraslice.runtime.configuration_intraslice import rotary_dim

# Rotary types whose frequencies are constants; those of the others change with the length of the text.
_CONSTANT_ROPE = ("default", "linear", "llama3", "yarn")


def rope_type(checkpoint: PrunedCheckpoint) -> str:
    """Return the type of the dense model's rotary embedding."""
    return (vars(checkpoint.dense).get("rope_parameters") or {}).get("rope_type", "default")


def dense_frequencies(checkpoint: PrunedCheckpoint) -> tuple[Tensor, float] | None:
    """Return the inverse frequencies of the rotated pairs of a dense head, float64, and the factor on cos and sin.

    None when they change with the length of the text.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dense, kind = checkpoint.dense, rope_type(checkpoint)
    if kind not in _CONSTANT_ROPE:
        return None
    if kind == "default":
        rotated = rotary_dim(dense)
        base = float(vars(dense)["rope_parameters"]["rope_theta"])
        return base ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated), 1.0
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](dense, torch.device("cpu"))
    return frequencies.double(), float(attention_factor)
