"""A size as the budget: the sparsity of the decoder layers with which a model has so many parameters or bytes."""

from __future__ import annotations

import math
from typing import Any

import torch

from intraslice.checkpoint.reader import build_skeleton
from intraslice.errors import BudgetError
from intraslice.methods.base import SizeLimits
from intraslice.methods.choices import load
from intraslice.numbers import count, size
from intraslice.progress import Progress
from intraslice.recipes.recipe import Recipe
from intraslice.results.result import PruneResult
from intraslice.runtime.configuration_intraslice import dense_shapes
from intraslice.runtime.families_intraslice import FamilySpec

_STEPS = 1_000_000
"""Sparsities are rounded up to one part of these."""

_ENTRY_BYTES = 128
"""What the header of a weight file has for a tensor besides its name, at most."""

_FILE_BYTES = 256
"""What it has besides the entries, at most."""


def sparsity_for_size(
    recipe: Recipe, config: Any, spec: FamilySpec, *, num_parameters: int, dtype: torch.dtype
) -> float:
    """Return the smallest sparsity with which the saved model is no larger than the recipe asks for.

    Embeddings, norms, biases and the head stay, and count. What repairs add and what rounded widths may miss counts as
    well, so that the finished model is not larger.

    Args:
        recipe: fitted to the model, with target_parameters or target_size.
        config: stock config of the dense model.
        spec: its family.
        num_parameters: all parameters of the dense model, tied ones once.
        dtype: of the saved weights.

    Raises:
        BudgetError: the dense model is smaller already, or no sparsity makes it so small; says what can be reached.
    """
    limits: SizeLimits = load(recipe.entry.form.size_limits)(config, spec, recipe.options)
    weights = sum(spec.num_parameters(shape, config.hidden_size) for shape in dense_shapes(config, spec))
    rest = num_parameters - weights + limits.parameters
    fixed, width = 0, 1
    wanted, name, shown = recipe.target_parameters, "--target-parameters", count
    if wanted is None:
        assert recipe.target_size is not None, "a size has to be given"
        wanted, name, shown = recipe.target_size, "--target-size", lambda value: f"{count(value)} bytes ({size(value)})"
        width = dtype.itemsize
        fixed = limits.index_bytes + _header_bytes(recipe, config, limits, num_parameters * width)
    dense = num_parameters * width
    if wanted > dense:
        raise BudgetError(
            f"{name} {shown(wanted)} is more than the {shown(dense)} of the dense model, so there is nothing to "
            "remove; ask for less."
        )
    sparsity = 1.0 - ((wanted - fixed) / width - rest - limits.slack) / weights
    if sparsity > limits.most + 1e-9:
        smallest = math.ceil(fixed + width * (rest + limits.slack + (1.0 - limits.most) * weights))
        if smallest > dense:
            raise BudgetError(f"{name} {shown(wanted)} cannot be reached: no step of the method makes it smaller.")
        raise BudgetError(
            f"{name} {shown(wanted)} cannot be reached: embeddings, norms and head stay, and the layers may lose at "
            f"most {limits.most:.1%} of their weights; {shown(smallest)} is the smallest that can be asked for."
        )
    return max(0.0, math.ceil(sparsity * _STEPS - 1e-6) / _STEPS)


def _header_bytes(recipe: Recipe, config: Any, limits: SizeLimits, num_bytes: int) -> int:
    """Return what the headers of the weight files take, at most."""
    names = [name for name in build_skeleton(config, recipe.model, torch.float32).state_dict()]
    entries = sum(map(len, names)) + len(names) * _ENTRY_BYTES + limits.tensors * (max(map(len, names)) + _ENTRY_BYTES)
    # Two neighboring files hold more than one full one.
    return entries + _FILE_BYTES * (2 * num_bytes // recipe.run.max_shard_bytes + 1)


def note_when_larger(recipe: Recipe, result: PruneResult, progress: Progress) -> None:
    """Say when a finished model is larger than it was to be, which only very coarse steps on small models can cause.

    Args:
        recipe: with the target.
        result: what was written.
        progress: takes the note.
    """
    for wanted, got, what in (
        (recipe.target_parameters, result.pruned_parameters, "parameters"),
        (recipe.target_size, result.pruned_bytes, "bytes"),
    ):
        if wanted is not None and got > wanted:
            progress.note(
                f"the model has {count(got)} {what} instead of at most {count(wanted)}: its widths come no nearer; ask "
                "for less, or lower ffn.ffn_multiple."
            )
