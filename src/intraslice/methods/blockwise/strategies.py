"""The parts that block-wise methods are composed of: one row per score, repair, allocation rule and so on. No torch.

Help, docs, validation of recipes, and the statistics that are measured are read from these tables. A new part is one
function and one row here; docs/extending.md shows each kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from intraslice.methods.choices import Row

_HERE = "intraslice.methods.blockwise"


@dataclass(frozen=True, kw_only=True)
class Score(Row):
    """What the units of a site are worth; `heads` and `channels` are functions of a `ScoreInput` (scores.py).

    A function returns one number per unit, or one per channel of the site: those of a head are then added up.

    Attributes:
        heads: function for query heads, "package.module:name"; "" when there is none.
        channels: the same for FFN channels.
        needs_full_moment: whether the second moment of all channels with all others is read. For FFNs it is always
            measured; for attention, where it costs (H d)^2 numbers, only when a score asks for it.
        needs_reading: whether the weights that read the input of an FFN are looked at, and the energy of that input.
        measures: what is measured before the first layer changes: "weights" (the gradients of all weights,
            weight_gradients.py), "curvature" (curvature_pass.py), or "" for nothing.
        head_rules: values of attention.heads that the score makes sense with; () means all.
        refine: function that improves the kept heads after they were chosen, or "".
    """

    heads: str = ""
    channels: str = ""
    needs_full_moment: bool = False
    needs_reading: bool = False
    measures: str = ""
    head_rules: tuple[str, ...] = ()
    refine: str = ""


SCORES: dict[str, Score] = {
    "energy": Score(
        summary="energy of the activations times that of the weights",
        heads=f"{_HERE}.scores:energy",
        channels=f"{_HERE}.scores:energy",
        paper="IntraSlice, Eq. 2",
        reads=("measured_on",),
    ),
    "norm": Score(
        summary="norm of the activations times the mean size of the weights",
        heads=f"{_HERE}.scores:norm",
        channels=f"{_HERE}.scores:norm",
        paper="Wanda, summed over a head or channel",
        reads=("measured_on",),
    ),
    "magnitude": Score(
        summary="norm of the activations alone",
        channels=f"{_HERE}.scores:magnitude",
        paper="TransAct",
        reads=("measured_on",),
    ),
    "fluctuation": Score(
        summary="variance of the activations times energy of the weights; squared for the channels of heads",
        heads=f"{_HERE}.scores:squared_fluctuation",
        channels=f"{_HERE}.scores:fluctuation",
        paper="FLAP",
        reads=("measured_on",),
    ),
    "pearson": Score(
        summary="what the correlation of every output channel with itself loses, then swaps of heads",
        heads=f"{_HERE}.scores:pearson",
        needs_full_moment=True,
        head_rules=("whole",),
        refine=f"{_HERE}.scores:swap_heads",
        paper="SlimLLM",
        reads=("measured_on",),
    ),
    "feature": Score(
        summary="activations times weights in the directions in which the output varies, and what gate and up read",
        channels=f"{_HERE}.scores:feature",
        needs_reading=True,
        paper="SlimLLM",
        reads=("measured_on",),
    ),
    "taylor": Score(
        summary="what the loss of the dense model says of all weights of a head or channel, to first order",
        heads=f"{_HERE}.scores:measured_before",
        channels=f"{_HERE}.scores:measured_before",
        measures="weights",
        paper="LLM-Pruner",
    ),
    "curvature": Score(
        summary="what the loss loses without a head or channel when the others make up for it, to second order",
        heads=f"{_HERE}.scores:measured_before",
        channels=f"{_HERE}.scores:measured_before",
        measures="curvature",
        reads=("obs_damping",),
        paper="LLM-Surgeon",
    ),
    "leverage": Score(
        summary="ridge leverage: how little the other channels can say of the channel",
        channels=f"{_HERE}.scores:leverage",
        reads=("obs_damping", "measured_on"),
        paper="MoDeGPT, Type I",
    ),
    "obs": Score(
        summary="order of greedy optimal-brain-surgeon elimination",
        heads=f"{_HERE}.scores:elimination",
        channels=f"{_HERE}.scores:elimination",
        needs_full_moment=True,
        reads=("obs_damping", "measured_on"),
        paper="SoBP",
    ),
}
"""`attention.score` and `ffn.score`; a row reads options of the section that names it."""


@dataclass(frozen=True, kw_only=True)
class Repair(Row):
    """What happens to the output projection of a site.

    Attributes:
        adds_bias: whether output projections get a bias.
        splits: whether it reads the sums over two halves of the sequences, and the site's own output beside the target.
    """

    adds_bias: bool = False
    splits: bool = False


REPAIRS: dict[str, Repair] = {
    "ridge": Repair(
        summary="ridge regression of the output projection",
        function=f"{_HERE}.repairs:ridge",
        reads=("measured_on", "damping", "damping_scale", "shrink_to", "repair_against"),
        paper="IntraSlice, Eq. 6 and 8",
    ),
    "cross_fit": Repair(
        summary="ridge regressions of the site's own output and of the drift, chosen across two halves of the text",
        function=f"{_HERE}.repairs:cross_fit",
        reads=("measured_on", "damping_scale", "shrink_to", "repair_against"),
        splits=True,
    ),
    "bias": Repair(
        summary="a bias that adds back the mean of what is missing",
        adds_bias=True,
        function=f"{_HERE}.repairs:mean_bias",
        reads=("measured_on", "repair_against"),
        paper="FLAP",
    ),
    "affine": Repair(
        summary="a factor and a bias for each output channel by least squares",
        adds_bias=True,
        function=f"{_HERE}.repairs:affine_fit",
        reads=("measured_on", "repair_against"),
        paper="SlimLLM",
    ),
    "none": Repair(summary="nothing is repaired", function=f"{_HERE}.repairs:nothing"),
}
"""`attention.repair` and `ffn.repair`; a row reads options of the section that names it."""


REPAIR_AGAINST: dict[str, Row] = {
    "own_output": Row(summary="what the dense site makes of the same input"),
    "dense_stream": Row(summary="what leads to the dense model's residual stream", reads=("drift_share",)),
}
"""`attention.repair_against` and `ffn.repair_against`; a row reads options of the section that names it."""


def in_section(table: Mapping[str, Row], section: str) -> dict[str, Row]:
    """Return a table that two sections share as one of them reads it: with dotted names."""

    def dotted(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{section}.{option}" for option in names)

    return {name: replace(row, reads=dotted(row.reads), excludes=dotted(row.excludes)) for name, row in table.items()}


@dataclass(frozen=True, kw_only=True)
class Measurement(Row):
    """On which input a site is measured.

    Attributes:
        of_attention: whether it says more for attention than another one does.
    """

    of_attention: bool = True


MEASUREMENTS: dict[str, Measurement] = {
    "pruned_stream": Measurement(summary="what the sites before it leave, pruned already", paper="IntraSlice"),
    "dense_layer": Measurement(
        summary="what the dense attention of the same layer leaves, behind layers that are pruned already",
        excludes=("repair_against", "drift_share"),
        of_attention=False,
        paper="Wanda, structured",
    ),
    "dense_stream": Measurement(
        summary="what the dense model has there", excludes=("repair_against", "drift_share"), paper="FLAP"
    ),
}
"""`attention.measured_on` and `ffn.measured_on`: the input on which scores and repairs of a site are measured. Where
that is not the pruned stream, a site is repaired against its own output there."""


HEAD_RULES: dict[str, Row] = {
    "adaptive": Row(
        summary="weak heads go while that keeps more of the output, the others become narrower",
        reads=(
            "attention.measured_on",
            "attention.score",
            "attention.min_head_fraction",
            "attention.head_multiple",
            "attention.gqa_groups",
            "attention.basis",
            "attention.pair_score",
            "attention.qk_width",
            "attention.head_budget",
            "attention.removal_order",
        ),
        paper="IntraSlice, Algorithm 2",
    ),
    "whole": Row(
        summary="whole heads go, the others keep their width",
        reads=("attention.score", "attention.gqa_groups"),
        paper="IntraSlice, Table 4 without Ada-H",
    ),
    "all": Row(
        summary="no head goes, all become narrower",
        reads=(
            "attention.measured_on",
            "attention.head_multiple",
            "attention.basis",
            "attention.pair_score",
            "attention.qk_width",
        ),
        paper="TransAct",
    ),
}
"""`attention.heads`."""


@dataclass(frozen=True, kw_only=True)
class Basis(Row):
    """What narrower heads keep.

    Attributes:
        needs_values: whether the second moments of the values are read.
    """

    needs_values: bool = False


BASES: dict[str, Basis] = {
    "pca": Basis(summary="the leading directions of the context", paper="IntraSlice, Algorithm 2"),
    "channels": Basis(summary="the channels of q, k and v with the largest activations", paper="TransAct"),
    "output": Basis(
        summary="the directions of the values that say most of what value and output projection give together",
        needs_values=True,
        paper="MoDeGPT, Type III",
    ),
}
"""`attention.basis`: what narrower heads keep."""

PAIR_SCORES: dict[str, Row] = {
    "mean_product": Row(
        summary="mean |q k| over all pairs of tokens",
        function="intraslice.algebra.scores:rope_pair_scores",
        paper="IntraSlice, appendix C.1",
    ),
    "energy": Row(
        summary="root of the product of the energies of q and k",
        function="intraslice.algebra.scores:pair_energy_scores",
        paper="MoDeGPT, Type II",
    ),
}
"""`attention.pair_score`: which pairs of channels narrower queries and keys keep."""


@dataclass(frozen=True, kw_only=True)
class AllocationRule(Row):
    """How much each site loses: a function (measured, sites, sparsity, options) -> Allocation.

    Attributes:
        measures: what the rule reads of the dense model: "nothing", "profile" (one forward pass, profile_pass.py), or
            "gradients" (a backward pass per sequence, gradient_pass.py), "divergences" (each site pruned alone,
            divergence_pass.py), "levels" (models put together from pruned sites, search_pass.py), "curvature" (shots of
            a Kronecker-factored curvature, curvature_pass.py), or "gates" (gates trained on the dense model,
            gate_pass.py).
    """

    measures: str = "nothing"


_ALLOCATORS = f"{_HERE}.allocators"
_MASK_GRADIENT = (
    *("allocation.pca_attention", "allocation.pca_ffn"),
    *("allocation.gradient_group", "allocation.ffn_share"),
)
ALLOCATION_RULES: dict[str, AllocationRule] = {
    "mask_gradient": AllocationRule(
        summary="channels ranked over all layers by the gradient of a mask",
        function=f"{_ALLOCATORS}.mask_gradient:allocate_by_mask_gradient",
        measures="gradients",
        reads=(*_MASK_GRADIENT, "allocation.shape_freedom", "allocation.drop_blocks"),
        paper="IntraSlice, Eq. 9-11",
    ),
    "divergence": AllocationRule(
        summary="where the next weight costs the same: each site is pruned alone, and predictions are compared",
        function=f"{_ALLOCATORS}.divergence:allocate_by_divergence",
        measures="divergences",
    ),
    "search": AllocationRule(
        summary="an evolutionary search over models put together from pruned sites, by their predictions",
        function=f"{_ALLOCATORS}.search:allocate_by_search",
        measures="levels",
        reads=(
            *("allocation.search_start", "allocation.search_moves", "allocation.search_rounds"),
            *("allocation.search_levels", "allocation.search_spacing"),
            *("allocation.search_generations", "allocation.search_offspring"),
        ),
        excludes=("allocation.budget_unit",),
        paper="Týr-the-Pruner",
    ),
    "curvature": AllocationRule(
        summary="one threshold for the costs per weight of heads and channels, lowered in several shots",
        function=f"{_ALLOCATORS}.curvature:allocate_by_curvature",
        measures="curvature",
        reads=("allocation.shots", "attention.obs_damping", "ffn.obs_damping"),
        paper="LLM-Surgeon",
    ),
    "gates": AllocationRule(
        summary="what gates keep that a small network learns to set, with the weights of the model frozen",
        function=f"{_ALLOCATORS}.gates:allocate_by_gates",
        measures="gates",
        reads=("allocation.gate_steps", "allocation.gate_rate", "allocation.gate_penalty"),
        paper="DISP-LLM",
    ),
    "uniform": AllocationRule(
        summary="the same share of every layer",
        function=f"{_ALLOCATORS}.uniform:allocate_uniform",
        reads=("allocation.ffn_share",),
    ),
    "inner": AllocationRule(
        summary="the same share of every layer but the first and the last ones, which keep everything",
        function=f"{_ALLOCATORS}.uniform:allocate_inner",
        reads=("allocation.ffn_share", "allocation.kept_first", "allocation.kept_last"),
        paper="LLM-Pruner",
    ),
    "fluctuation": AllocationRule(
        summary="whole heads and channels ranked by standardized fluctuations",
        function=f"{_ALLOCATORS}.profile:allocate_by_fluctuation",
        measures="profile",
        paper="FLAP",
    ),
    "similarity": AllocationRule(
        summary="more from layers whose output resembles their input",
        function=f"{_ALLOCATORS}.profile:allocate_by_similarity",
        measures="profile",
        reads=("allocation.ffn_share", "allocation.similarity_scale", "allocation.kept_layers"),
        paper="SlimLLM",
    ),
    "head_search": AllocationRule(
        summary="whole heads and channels ranked by squared mask gradients, the number of heads searched",
        function=f"{_ALLOCATORS}.mask_gradient:allocate_by_head_search",
        measures="gradients",
        reads=("allocation.gradient_group", "allocation.channel_balance"),
        paper="SoBP",
    ),
}
"""`allocation.rule`."""

SEARCH_STARTS: dict[str, Row] = {
    "uniform": Row(summary="the same share of every layer", reads=("allocation.ffn_share",)),
    "mask_gradient": Row(summary="what mask gradients say", reads=_MASK_GRADIENT),
}
"""`allocation.search_start`: rows of ALLOCATION_RULES from which a search begins."""

_SHAPED = (
    *("attention.gqa_groups", "attention.qk_width", "allocation.budget_unit"),
    *("attention.head_budget", "attention.removal_order"),
)
SHAPE_FREEDOMS: dict[str, Row] = {
    "free": Row(summary="every layer its own, groups may be ragged", paper="IntraSlice"),
    "layer": Row(summary="one group size per layer", reads=("attention.context_multiple",), excludes=_SHAPED),
    "width": Row(
        summary="also one head width and one choice of RoPE pairs for all layers",
        reads=("attention.context_multiple",),
        excludes=_SHAPED,
    ),
    "model": Row(summary="one shape for all layers", reads=("attention.context_multiple",), excludes=_SHAPED),
}
"""`allocation.shape_freedom`: which shapes layers may take, for runtimes that want them alike."""

PCA_ATTENTION: dict[bool, Row] = {
    True: Row(summary="gradients rotated into eigenvectors", reads=("allocation.rotation",)),
    False: Row(summary="gradients as they are"),
}
"""`allocation.pca_attention`."""

PCA_FFN: dict[bool, Row] = {
    True: Row(
        summary="gradients rotated into eigenvectors", reads=("allocation.rotation", "allocation.num_channel_groups")
    ),
    False: Row(summary="gradients as they are"),
}
"""`allocation.pca_ffn`."""

DROP_BLOCKS: dict[bool, Row] = {
    True: Row(
        summary="attention and FFNs of which little is lost go as a whole",
        reads=("allocation.max_dropped_share", "allocation.max_drop_price"),
    ),
    False: Row(summary="every layer keeps both"),
}
"""`allocation.drop_blocks`."""

_DISTILL = ("distill.epochs", "distill.learning_rate", "distill.held_out")
DISTILL_SITES: dict[str, Row] = {
    "none": Row(summary="output projections are solved in closed form, and nothing is trained"),
    "attention": Row(summary="attention", reads=(*_DISTILL, "attention.repair_against")),
    "ffn": Row(summary="FFNs", reads=(*_DISTILL, "ffn.repair_against")),
    "all": Row(summary="both", reads=(*_DISTILL, "attention.repair_against", "ffn.repair_against")),
}
"""`distill.sites`: which sites are trained towards their target."""

_TUNE = ("tune.epochs", "tune.learning_rate", "tune.held_out")
TUNE_SITES: dict[str, Row] = {
    "none": Row(summary="layers stay as they were left one by one"),
    "attention": Row(summary="attention of all layers", reads=_TUNE),
    "ffn": Row(summary="FFNs of all layers", reads=_TUNE),
    "all": Row(summary="both", reads=_TUNE),
}
"""`tune.sites`: which sites are trained together, after the last layer, towards the predictions of the dense model."""
TUNED_KINDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "attention": ("attention",),
    "ffn": ("ffn",),
    "all": ("attention", "ffn"),
}
"""The kinds of sites behind the names of TUNE_SITES."""

ITER_PCA: dict[bool, Row] = {
    True: Row(
        summary="dense maps of the channels in the FFNs that lose most",
        reads=(
            "ffn.iter_pca_fraction",
            "ffn.iter_pca_rounds",
            "ffn.iter_pca_slice",
            "ffn.iter_pca_most_kept",
            "ffn.iter_pca_steps",
            "ffn.iter_pca_batches",
            "ffn.iter_pca_lr",
            "ffn.iter_pca_decay",
            "ffn.damping",
            "ffn.damping_scale",
            "ffn.shrink_to",
            "ffn.repair_against",
        ),
        paper="IntraSlice, Eq. 7",
    ),
    False: Row(summary="channels are selected only"),
}
"""`ffn.iter_pca`."""
