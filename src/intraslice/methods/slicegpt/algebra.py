"""A rotated and sliced residual stream. Paper: SliceGPT, arXiv 2401.15024.

A basis B [D, d] holds the leading directions of the stream at one place; the stream there is stored as x B. Since the
columns are orthonormal, an RMSNorm sees of x B what it would see of the projection x B B^T.

Shapes: D hidden_size of the dense model, d width of the sliced stream, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intraslice.algebra.linalg import eigh_descending
from intraslice.algebra.selection import MULTIPLES, TOLERANCE
from intraslice.errors import BudgetError, NumericalError
from intraslice.runtime.families_intraslice import FamilySpec


def slice_width(
    num_layers: int, weights_per_channel: int, intermediate_size: int, hidden_size: int, sparsity: float
) -> int:
    """Return the width of the sliced stream that meets the budget, the matrices on the residual connections counted.

    A layer has weights_per_channel * d + 2 d^2 weights, which is more than the dense layer's at d = D: a small sparsity
    already costs many directions. Behind the last layer the stream is whole: its down projection and the matrix beside
    it have (D - d) (F + d) weights more.

    Args:
        num_layers: layers of the model.
        weights_per_channel: linear weights of a layer that belong to one channel of the residual stream.
        intermediate_size: F.
        hidden_size: D.
        sparsity: fraction of the layers' weights to remove.

    Raises:
        BudgetError: the stream is too narrow to come close to the budget.
    """
    D, F, per = hidden_size, intermediate_size, num_layers * weights_per_channel
    dense = per * D

    def stored(width: int) -> int:
        return per * width + 2 * num_layers * width**2 + (D - width) * (F + width)

    # stored(d) = square d^2 + linear d + D F
    square, linear = 2 * num_layers - 1, per + D - F
    exact = ((linear**2 + 4 * square * max(0.0, (1 - sparsity) * dense - D * F)) ** 0.5 - linear) / (2 * square)
    reached = 0.0
    for multiple in MULTIPLES:
        width = max(multiple, multiple * round(exact / multiple))
        reached = 1 - stored(width) / dense
        if abs(reached - sparsity) <= TOLERANCE:
            return width
    raise BudgetError(
        f"sparsity {sparsity:g} was asked for, but a residual stream of {hidden_size} channels can be sliced only to "
        f"{reached:.4f}; choose a sparsity near that."
    )


def leading_directions(moment_DD: Tensor, width: int) -> tuple[Tensor, float]:
    """Return the principal directions of a second moment [D, width], and the share of its trace outside of them.

    Raises:
        NumericalError: the moment is not finite.
    """
    if not torch.isfinite(moment_DD).all():
        raise NumericalError("the residual stream contains NaN or infinite values.")
    values, vectors = eigh_descending(moment_DD)
    return vectors[:, :width].contiguous(), float(values[width:].sum() / values.sum().clamp_min(1e-300))


def rotate_rows(weight_OD: Tensor, basis_Dd: Tensor, norm_D: Tensor | None = None) -> Tensor:
    """Return a weight [O, d] that reads the sliced stream, in the dtype of `weight`.

    Args:
        weight_OD: weight that reads the stream, or whose rows are added to it (embeddings).
        basis_Dd: directions of the stream there.
        norm_D: weight of the RMSNorm in between, which is fused into the result; with it the result is scaled by
            sqrt(D / d), because the sliced norm divides by the root mean square of d channels instead of D.
    """
    D, d = basis_Dd.shape
    map_Dd = basis_Dd if norm_D is None else norm_D.to(basis_Dd.dtype).unsqueeze(1) * basis_Dd * (D / d) ** 0.5
    # Some rows at a time: an embedding matrix in float64 would not fit beside the rest.
    return torch.cat([(rows.to(map_Dd.dtype) @ map_Dd).to(weight_OD.dtype) for rows in weight_OD.split(8192)])


def rotate_layer(
    tensors: Mapping[str, Tensor], spec: FamilySpec, bases: tuple[Tensor, Tensor, Tensor | None]
) -> dict[str, Tensor]:
    """Return the tensors of a dense layer for the sliced stream, with the matrices of its residual connections.

    Args:
        tensors: by name relative to the layer.
        spec: the family.
        bases: directions of the stream before the layer, between its blocks, and after it, each [D, d]; None where
            the stream after it is the dense one.
    """
    rotated = dict(tensors)
    halves = (
        (spec.attention_norm, spec.attention_paths, "attn_shortcut"),
        (spec.ffn_norm, spec.ffn_paths, "mlp_shortcut"),
    )
    first, middle, last = bases
    pairs = ((first, middle), (middle, torch.eye(len(first), dtype=first.dtype) if last is None else last))
    for (norm, (reading, writing), shortcut), (before, after) in zip(halves, pairs, strict=True):
        norm_weight = tensors[f"{norm}.weight"]
        for path in reading:
            rotated[f"{path}.weight"] = rotate_rows(tensors[f"{path}.weight"], before, norm_weight)
        for name in (f"{writing}.weight", f"{writing}.bias"):
            if name in tensors:
                rotated[name] = (after.T @ tensors[name].to(after.dtype)).to(tensors[name].dtype)
        rotated[f"{norm}.weight"] = torch.ones(before.shape[1], dtype=norm_weight.dtype)
        rotated[f"{shortcut}.weight"] = (after.T @ before).to(norm_weight.dtype)
    return rotated
