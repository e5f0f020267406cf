"""The settings of the method: plain frozen dataclasses, validated by `recipe.py`, read by the pure code.

The ablations of the paper's Table 4 are values of these fields:
    Ada-H  attention.adaptive_heads
    Pca-A  allocation.pca_attention and allocation.pca_ffn
    IPca   ffn.iter_pca
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class AllocationOptions:
    """How much each layer loses (paper section 3.3).

    Attributes:
        name: "mask_gradient" ranks channels over all layers (Eq. 9-11); "uniform" gives each layer the same share;
            "fluctuation" ranks whole heads and channels by standardised fluctuations (FLAP); "similarity" takes more
            from layers whose output resembles their input (SlimLLM); "head_search" ranks whole heads and channels
            by squared mask gradients and searches the number of heads (SoBP).
        pca_attention: rotate the mask gradients of `context` into its per-head eigenvectors (Eq. 11).
        pca_ffn: rotate the mask gradients of `act` into the eigenvectors of blocks of channels (Eq. 11).
        ffn_bias: lambda_b; the FFN loses ffn_bias times the target sparsity, attention the rest. Not used by
            "fluctuation" and "head_search", which find that split themselves.
        count: what a block's share counts: its "weights", or the "units" that whole-head methods remove, query heads
            and FFN channels. A kv head is no unit; it stays until the last of its query heads goes.
        similarity_scale: alpha of "similarity": layers lose in proportion to exp(alpha * cosine similarity).
        max_block_sparsity: cap on what one attention or FFN block may lose; the excess goes to other layers.
        num_ffn_blocks: into how many blocks the channels of `act` are cut for the correction.
        shapes: which shapes layers may take: "free" (the paper), "layer" (one group size a layer), "width" (also one
            head width and one choice of RoPE pairs for all layers), or "model" (one shape for all layers).
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["mask_gradient", "uniform", "fluctuation", "similarity", "head_search"] = "mask_gradient"
    pca_attention: bool = True
    pca_ffn: bool = True
    ffn_bias: float = 1.15
    count: Literal["weights", "units"] = "weights"
    similarity_scale: float = 10.0
    max_block_sparsity: float = 0.9
    num_ffn_blocks: int = 32
    shapes: Literal["free", "layer", "width", "model"] = "free"


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """How one attention block is compressed (paper section 3.1, Algorithm 2).

    Attributes:
        score: what a head is worth: "energy" (Eq. 2), "norm" (structured Wanda), "fluctuation" (FLAP), "pearson"
            (SlimLLM: what the output's correlation with itself loses, then swaps of heads), or "obs" (SoBP: the order
            of greedy optimal-brain-surgeon elimination).
        adaptive_heads: remove weak heads and shrink the others; False removes whole heads only.
        keep_heads: no head goes, all become narrower (TransAct); wins over adaptive_heads.
        basis: what narrower heads keep: "pca" (the leading directions of Algorithm 2), or "channels" of q, k and v
            with the largest activations (TransAct).
        min_head_fraction: heads keep at least this fraction of head_dim (paper: 96 of 128); 0 switches it off.
        head_multiple: kept head dimensions are a multiple of this (even, because of RoPE pairs).
        context_multiple: query heads times their width are a multiple of this; for allocation.shapes other than "free".
        repair: what happens to o_proj afterwards: "ridge" regression (Eq. 6), a "bias" that adds back the mean of what
            is missing (FLAP), an "affine" fit of each output channel (SlimLLM), or "none". "ridge" with
            shrink_to = "weights" and target = "block" is the optimal-brain-surgeon update (SoBP).
        damping: lambda of Eq. 6, relative to the mean diagonal of the second moment.
        shrink_to: what lambda pulls the solution towards: "weights" (what plain removal would leave), or "zero"
            (Eq. 6 to the letter).
        target: what the block is repaired against: "block" (what the dense block makes of the same input), or
            "model" (what the dense model has in its residual stream there, so that the errors of the layers before
            are repaired as well).
        groups: "ragged" lets query heads of a kv head go one by one; "uniform" keeps one group size per layer.
    """

    __pydantic_config__ = {"extra": "forbid"}

    score: Literal["energy", "norm", "fluctuation", "pearson", "obs"] = "energy"
    adaptive_heads: bool = True
    keep_heads: bool = False
    basis: Literal["pca", "channels"] = "pca"
    min_head_fraction: float = 0.75
    head_multiple: int = 4
    context_multiple: int = 1
    repair: Literal["ridge", "bias", "affine", "none"] = "ridge"
    damping: float = 0.05
    shrink_to: Literal["weights", "zero"] = "weights"
    target: Literal["block", "model"] = "model"
    groups: Literal["ragged", "uniform"] = "ragged"


@dataclass(frozen=True, kw_only=True)
class FFNOptions:
    """How one FFN block is compressed (paper section 3.2, Algorithm 3).

    Attributes:
        score: what a channel is worth: "energy" (section 3.2), "norm" (structured Wanda), "magnitude" (TransAct),
            "fluctuation" (FLAP), "feature" (SlimLLM: in the directions in which the output varies), or "obs" (SoBP: the
            order of greedy optimal-brain-surgeon elimination).
        repair: what happens to down_proj: "ridge" (Eq. 8), "bias", "affine" or "none", as for attention.
        damping: lambda of Eq. 8, relative to the mean diagonal of the second moment.
        shrink_to: "weights" or "zero", as for attention.
        target: "block" or "model", as for attention.
        ffn_multiple: kept channels are a multiple of this.
        iter_pca: progressive sliced iterative PCA (Eq. 7) in the layers that lose the most.
        iter_pca_fraction: the share of layers it is applied to, those with the highest FFN sparsity first.
        iter_pca_rounds: how often Eq. 7 and Eq. 8 alternate.
        iter_pca_slice: width of an input slice; 0 cuts the input into four slices.
        iter_pca_steps: Adam steps a slice.
        iter_pca_lr: learning rate of the first slice, relative to the size of Q_c's entries.
    """

    __pydantic_config__ = {"extra": "forbid"}

    score: Literal["energy", "norm", "magnitude", "fluctuation", "feature", "obs"] = "energy"
    repair: Literal["ridge", "bias", "affine", "none"] = "ridge"
    damping: float = 0.1
    shrink_to: Literal["weights", "zero"] = "weights"
    target: Literal["block", "model"] = "model"
    ffn_multiple: int = 8
    iter_pca: bool = False
    iter_pca_fraction: float = 0.1
    iter_pca_rounds: int = 2
    iter_pca_slice: int = 0
    iter_pca_steps: int = 20
    iter_pca_lr: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Everything that decides which weights come out, given a model and calibration tokens.

    Attributes:
        sparsity: fraction of the decoder layers' linear weights to remove, in [0, 0.95).
        architecture: "block" makes attention heads and FFN channels fewer and narrower; "factors" stores each weight
            as two factors (SVD-LLM), "residual" rotates and slices the residual stream (SliceGPT): these two follow
            from the sparsity alone and read no other option of the method.
    """

    sparsity: float
    architecture: Literal["block", "factors", "residual"] = "block"
    allocation: AllocationOptions = AllocationOptions()
    attention: AttentionOptions = AttentionOptions()
    ffn: FFNOptions = FFNOptions()
