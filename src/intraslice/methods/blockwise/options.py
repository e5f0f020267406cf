"""The options of block-wise methods: plain frozen dataclasses, checked by the recipe, read by the pure code. No torch.

The ablations of the paper's Table 4 are values of these fields:
    Ada-H  attention.heads
    Pca-A  allocation.pca_attention and allocation.pca_ffn
    IPca   ffn.iter_pca
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MultipleOf

from intraslice.methods.blockwise import strategies
from intraslice.methods.choices import OneOf, Row, option_values, read_names

MAX_MULTIPLE = 1 << 16
"""No model has layers of which this many channels could be a step."""


@dataclass(frozen=True, kw_only=True)
class AllocationOptions:
    """How much each site loses (paper section 3.3).

    Attributes:
        rule: a row of ALLOCATION_RULES.
        pca_attention: rotate the mask gradients of `context` into its per-head eigenvectors (Eq. 11).
        pca_ffn: rotate the mask gradients of `act` into the eigenvectors of groups of channels (Eq. 11).
        rotation: what rotating means: "letter" (Eq. 11: the gradients of masks on the channels are rotated), or "exact"
            (the gradients of masks on the eigenvectors).
        gradient_group: gradients of this many sequences are summed before they are squared.
        ffn_share: lambda_b; the FFNs lose ffn_share times the target sparsity, attention the rest.
        budget_unit: what a site's share counts: its "weights", the "units" that whole-head methods remove (query heads
            and FFN channels; a kv head is no unit and stays until the last of its query heads goes), or "groups": kv
            heads with all their query heads, and FFN channels.
        similarity_scale: alpha of "similarity": layers lose in proportion to exp(alpha * cosine similarity).
        channel_balance: what a channel counts beside a head in "head_search": this times the ratio of their weights.
        shots: of "curvature": what goes, goes in this many steps, and costs are measured anew before each one.
        gate_steps: of "gates": steps of training, each of them on one batch (run.batch_tokens).
        gate_rate: learning rate of the network that sets the gates.
        gate_penalty: the loss of a token weighs against this times |log(T / p)|: T is the share of the weights whose
            gates are open, p the one that shall be.
        search_start: of "search", a row of SEARCH_STARTS: what each site loses before the first round.
        search_moves: weights move among sites of one "kind", or among "any".
        search_rounds: rounds; in each one all sites are pruned anew, around where they stand, with half the spacing.
        search_levels: how many losses of each site are tried in a round.
        search_spacing: between them in the first round: share of the weights of a site, or with moves among any sites
            of those of a mean site.
        search_generations: generations of a round.
        search_offspring: models that are put together in a generation.
        kept_layers: share of the layers that lose nothing with "similarity", those of the lowest similarity.
        kept_first: share of the layers that lose nothing with "inner", those at the beginning.
        kept_last: the same at the end.
        max_site_sparsity: cap on what one site may lose; the excess goes to other layers.
        num_channel_groups: into how many groups the channels of `act` are cut for the rotation.
        shape_freedom: a row of SHAPE_FREEDOMS.
        drop_blocks: whether the attention or the FFN of a layer may go as a whole.
        max_dropped_share: cap on the share of all these blocks that goes.
        max_drop_price: a block goes only where its importance is less than this many times what thinning would take for
            as many weights; above 1, quality is paid for speed.
    """

    __pydantic_config__ = {"extra": "forbid"}

    rule: Annotated[str, OneOf(strategies.ALLOCATION_RULES)] = "mask_gradient"
    pca_attention: Annotated[bool, OneOf(strategies.PCA_ATTENTION)] = True
    pca_ffn: Annotated[bool, OneOf(strategies.PCA_FFN)] = True
    rotation: Literal["letter", "exact"] = "letter"
    gradient_group: Annotated[int, Ge(1)] = 1
    ffn_share: Annotated[float, Gt(0)] = 1.15
    budget_unit: Literal["weights", "units", "groups"] = "weights"
    similarity_scale: Annotated[float, Ge(0)] = 10.0
    channel_balance: Annotated[float, Gt(0)] = 250.0
    shots: Annotated[int, Ge(1)] = 5
    gate_steps: Annotated[int, Ge(1)] = 200
    gate_rate: Annotated[float, Gt(0)] = 1e-2
    gate_penalty: Annotated[float, Gt(0)] = 6.0
    search_start: Annotated[str, OneOf(strategies.SEARCH_STARTS)] = "uniform"
    search_moves: Literal["kind", "any"] = "kind"
    search_rounds: Annotated[int, Ge(1)] = 2
    search_levels: Annotated[int, Ge(3)] = 5
    search_spacing: Annotated[float, Gt(0), Lt(0.5)] = 0.125
    search_generations: Annotated[int, Ge(1)] = 12
    search_offspring: Annotated[int, Ge(1)] = 16
    kept_layers: Annotated[float, Ge(0), Lt(1)] = 0.1875
    kept_first: Annotated[float, Ge(0), Lt(0.5)] = 0.125
    kept_last: Annotated[float, Ge(0), Lt(0.5)] = 0.0625
    max_site_sparsity: Annotated[float, Gt(0), Lt(1)] = 0.9
    num_channel_groups: Annotated[int, Ge(1)] = 32
    shape_freedom: Annotated[str, OneOf(strategies.SHAPE_FREEDOMS)] = "free"
    drop_blocks: Annotated[bool, OneOf(strategies.DROP_BLOCKS)] = False
    max_dropped_share: Annotated[float, Gt(0), Lt(1)] = 0.1
    max_drop_price: Annotated[float, Gt(0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """How one attention site is compressed (paper section 3.1, Algorithm 2).

    Attributes:
        heads: a row of HEAD_RULES: whether heads go, become narrower, or both.
        score: what a head is worth, a row of SCORES.
        obs_damping: lambda of the scores "obs", "leverage" and "curvature", relative to the mean diagonal of the second
            moment.
        basis: what narrower heads keep, a row of BASES.
        pair_score: which pairs of channels narrower queries and keys keep, a row of PAIR_SCORES.
        qk_width: "narrow" (query and key become as narrow as the value), or "dense" (they keep their width; only value
            and output become narrower).
        min_head_fraction: heads keep at least this fraction of head_dim (paper: 96 of 128); 0 switches it off.
        head_multiple: kept head dimensions are a multiple of this (even, because of RoPE pairs).
        context_multiple: query heads times their width are a multiple of this, where shapes are not free.
        repair: what happens to o_proj afterwards, a row of REPAIRS. "ridge" with shrink_to = "weights" and
            repair_against = "own_output" is the optimal-brain-surgeon update (SoBP).
        damping: lambda of the ridge regression (Eq. 6), relative to the diagonal of the second moment.
        damping_scale: to its "mean", or to the energy of each "channel" that the output projection reads.
        shrink_to: what lambda pulls the solution towards: "weights" (what plain removal would leave), or "zero"
            (Eq. 6 to the letter).
        repair_against: "own_output" (what the dense site makes of the same input), or "dense_stream" (the dense
            model's residual stream there, so that the errors of the layers before are repaired as well).
        drift_share: which share of these errors, alpha, the target of "dense_stream" has in it: it is the dense site's
            own output plus alpha times what is missing besides. With repair = "cross_fit" the largest share.
        gqa_groups: "ragged" lets the query heads of a kv head go one by one; "uniform" keeps one group size per layer;
            with "whole" a kv head goes with all its query heads.
        measured_on: the input on which scores and repair are measured, a row of MEASUREMENTS.
        head_budget: what the share of attention counts where heads become narrower: all its "weights", or with grouped
            queries the dimensions of "queries" alone, as published; then the FFN of the layer pays for the kv heads.
        removal_order: which head is tried next: the one of which the narrower heads keep least ("kept_score"), until
            one gains nothing, or each once by its whole "score" (Algorithm 2, line 10).
    """

    __pydantic_config__ = {"extra": "forbid"}

    heads: Annotated[str, OneOf(strategies.HEAD_RULES)] = "adaptive"
    score: Annotated[str, OneOf(strategies.SCORES, lambda row: bool(row.heads))] = "energy"
    obs_damping: Annotated[float, Gt(0)] = 0.05
    basis: Annotated[str, OneOf(strategies.BASES)] = "pca"
    pair_score: Annotated[str, OneOf(strategies.PAIR_SCORES)] = "mean_product"
    qk_width: Literal["narrow", "dense"] = "narrow"
    min_head_fraction: Annotated[float, Ge(0), Le(1)] = 0.75
    head_multiple: Annotated[int, Ge(2), Le(MAX_MULTIPLE), MultipleOf(2)] = 4
    context_multiple: Annotated[int, Ge(1), Le(MAX_MULTIPLE)] = 1
    repair: Annotated[str, OneOf(strategies.REPAIRS)] = "ridge"
    damping: Annotated[float, Gt(0)] = 0.05
    damping_scale: Literal["mean", "channel"] = "mean"
    shrink_to: Literal["weights", "zero"] = "weights"
    repair_against: Annotated[str, OneOf(strategies.REPAIR_AGAINST)] = "dense_stream"
    drift_share: Annotated[float, Gt(0), Le(1)] = 1.0
    gqa_groups: Literal["ragged", "uniform", "whole"] = "ragged"
    measured_on: Annotated[str, OneOf(strategies.MEASUREMENTS, lambda row: row.of_attention)] = "pruned_stream"
    head_budget: Literal["weights", "queries"] = "weights"
    removal_order: Literal["kept_score", "score"] = "kept_score"


@dataclass(frozen=True, kw_only=True)
class FFNOptions:
    """How one FFN site is compressed (paper section 3.2, Algorithm 3).

    Attributes:
        score: what a channel is worth, a row of SCORES.
        obs_damping: as for attention.
        repair: what happens to down_proj, a row of REPAIRS.
        damping: lambda of the ridge regressions (Eq. 7 and 8), relative to the diagonal of the second moment.
        damping_scale: "mean" or "channel", as for attention.
        shrink_to: "weights" or "zero", as for attention.
        repair_against: "own_output" or "dense_stream", as for attention.
        drift_share: as for attention.
        ffn_multiple: kept channels are a multiple of this.
        measured_on: as for attention; "dense_layer" leaves the attention of the same layer dense.
        iter_pca: progressive sliced iterative PCA (Eq. 7) in the layers that lose the most.
        iter_pca_fraction: the share of layers it is applied to, those with the highest FFN sparsity first.
        iter_pca_rounds: how often Eq. 7 and Eq. 8 alternate.
        iter_pca_slice: width of an input slice; 0 cuts the input into four slices.
        iter_pca_most_kept: only in FFNs that keep at most this fraction of their channels.
        iter_pca_steps: Adam steps per slice.
        iter_pca_batches: forward batches (run.batch_tokens) that a step sees.
        iter_pca_lr: learning rate of the first slice, relative to the size of Q_c's entries.
        iter_pca_decay: how it falls from slice to slice: "linear", or "halving" as in the published code.
    """

    __pydantic_config__ = {"extra": "forbid"}

    score: Annotated[str, OneOf(strategies.SCORES, lambda row: bool(row.channels))] = "energy"
    obs_damping: Annotated[float, Gt(0)] = 0.1
    repair: Annotated[str, OneOf(strategies.REPAIRS)] = "ridge"
    damping: Annotated[float, Gt(0)] = 0.1
    damping_scale: Literal["mean", "channel"] = "mean"
    shrink_to: Literal["weights", "zero"] = "weights"
    repair_against: Annotated[str, OneOf(strategies.REPAIR_AGAINST)] = "dense_stream"
    drift_share: Annotated[float, Gt(0), Le(1)] = 1.0
    ffn_multiple: Annotated[int, Ge(1), Le(MAX_MULTIPLE)] = 8
    measured_on: Annotated[str, OneOf(strategies.MEASUREMENTS)] = "pruned_stream"
    iter_pca: bool = False
    iter_pca_fraction: Annotated[float, Ge(0), Le(1)] = 0.1
    iter_pca_rounds: Annotated[int, Ge(1)] = 2
    iter_pca_slice: Annotated[int, Ge(0)] = 0
    iter_pca_most_kept: Annotated[float, Gt(0), Le(1)] = 1.0
    iter_pca_steps: Annotated[int, Ge(1)] = 20
    iter_pca_batches: Annotated[int, Ge(1)] = 1
    iter_pca_lr: Annotated[float, Gt(0)] = 1e-3
    iter_pca_decay: Literal["linear", "halving"] = "linear"


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """Training of all weights of a site towards its target, after the closed form and before the next site.

    Attributes:
        sites: which sites are trained, a row of DISTILL_SITES.
        epochs: how often the training sequences are seen.
        learning_rate: of Adam at the start, relative to the root mean square of each matrix; it falls to 0.
        held_out: share of the calibration batches that judge; at least one.
    """

    __pydantic_config__ = {"extra": "forbid"}

    sites: Annotated[str, OneOf(strategies.DISTILL_SITES)] = "none"
    epochs: Annotated[float, Gt(0)] = 2.0
    learning_rate: Annotated[float, Gt(0)] = 5e-3
    held_out: Annotated[float, Gt(0), Lt(1)] = 0.125


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Training of all layers together, after the last one, towards the predictions of the dense model.

    Attributes:
        sites: which sites are trained, a row of TUNE_SITES.
        epochs: how often the training sequences are seen; a step is one batch (run.batch_tokens).
        learning_rate: of Adam at its peak, relative to the root mean square of each matrix.
        held_out: share of the calibration batches that judge, at least one; nothing else is fitted to them either.
    """

    __pydantic_config__ = {"extra": "forbid"}

    sites: Annotated[str, OneOf(strategies.TUNE_SITES)] = "none"
    epochs: Annotated[float, Gt(0)] = 1.0
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    held_out: Annotated[float, Gt(0), Lt(1)] = 0.0625


ALWAYS_READ = (
    "distill.sites",
    "tune.sites",
    "allocation.rule",
    "allocation.max_site_sparsity",
    "allocation.budget_unit",
    "attention.heads",
    "attention.repair",
    "ffn.score",
    "ffn.repair",
    "ffn.ffn_multiple",
    "ffn.iter_pca",
)


def choices() -> dict[str, Mapping[Any, Row]]:
    """Return the table of each option that is a choice."""
    return {
        "allocation.rule": strategies.ALLOCATION_RULES,
        "allocation.shape_freedom": strategies.SHAPE_FREEDOMS,
        "allocation.pca_attention": strategies.PCA_ATTENTION,
        "allocation.pca_ffn": strategies.PCA_FFN,
        "allocation.drop_blocks": strategies.DROP_BLOCKS,
        "allocation.search_start": strategies.SEARCH_STARTS,
        "attention.heads": strategies.HEAD_RULES,
        "attention.score": strategies.in_section(strategies.SCORES, "attention"),
        "attention.basis": strategies.BASES,
        "attention.pair_score": strategies.PAIR_SCORES,
        "attention.measured_on": strategies.in_section(strategies.MEASUREMENTS, "attention"),
        "attention.repair": strategies.in_section(strategies.REPAIRS, "attention"),
        "attention.repair_against": strategies.in_section(strategies.REPAIR_AGAINST, "attention"),
        "ffn.score": strategies.in_section(strategies.SCORES, "ffn"),
        "ffn.measured_on": strategies.in_section(strategies.MEASUREMENTS, "ffn"),
        "ffn.repair": strategies.in_section(strategies.REPAIRS, "ffn"),
        "ffn.repair_against": strategies.in_section(strategies.REPAIR_AGAINST, "ffn"),
        "ffn.iter_pca": strategies.ITER_PCA,
        "distill.sites": strategies.DISTILL_SITES,
        "tune.sites": strategies.TUNE_SITES,
    }


@dataclass(frozen=True, kw_only=True)
class BlockwiseOptions:
    """Everything besides the sparsity that decides which weights a block-wise method leaves."""

    allocation: AllocationOptions = AllocationOptions()
    attention: AttentionOptions = AttentionOptions()
    ffn: FFNOptions = FFNOptions()
    distill: DistillOptions = DistillOptions()
    tune: TuneOptions = TuneOptions()

    def read(self) -> set[str]:
        """Return the dotted names of the options that have an effect."""
        return read_names(option_values(self), ALWAYS_READ, choices())

    def distills(self, kind: str) -> bool:
        """Return whether sites of a kind are trained."""
        return self.distill.sites in (kind, "all")

    @property
    def rule(self) -> strategies.AllocationRule:
        """The row of the allocation rule."""
        return strategies.ALLOCATION_RULES[self.allocation.rule]

    def contradiction(self, method: str, target: str) -> str | None:
        """Return a sentence when two options do not go together; None when all do.

        Args:
            method: name of the preset.
            target: the runtime that the shapes are chosen for.
        """
        freedom, rule = self.allocation.shape_freedom, self.allocation.rule
        if freedom != "free" and rule != "mask_gradient":
            return (
                f"allocation.shape_freedom = {freedom} (target {target}) chooses shapes by mask gradients, which "
                f"allocation.rule = {rule} (method {method}) does not rank; leave shapes free, as --target "
                "transformers does, or use --set allocation.rule=mask_gradient."
            )
        for name, site in (("attention", self.attention), ("ffn", self.ffn)):
            measured = strategies.SCORES[site.score].measures and f"{name}.score" in self.read()
            if self.rule.measures in ("divergences", "levels") and measured:
                return (
                    f"allocation.rule = {rule} prunes each site before any gradient is measured, but {name}.score = "
                    f"{site.score} (method {method}) reads them; take another score, or another allocation.rule."
                )
        if freedom != "free" and self.attention.heads == "all":
            return (
                f"attention.heads = all (method {method}) keeps every head, but allocation.shape_freedom = {freedom} "
                f"(target {target}) chooses how many heads stay; set attention.heads to adaptive or whole, or leave "
                "shapes free, as --target transformers does."
            )
        drops = self.allocation.drop_blocks and "allocation.drop_blocks" in self.read()
        if drops and (target == "stock" or freedom == "model"):
            return (
                f"allocation.drop_blocks takes whole blocks out of layers, which --target {target} cannot run; use "
                "--target transformers, vllm or llama.cpp, or leave every layer its blocks."
            )
        if drops and self.allocation.budget_unit != "weights":
            return (
                f"allocation.drop_blocks saves weights, which allocation.budget_unit = {self.allocation.budget_unit} "
                "does not count; set it to weights, or leave every layer its blocks."
            )
        trained = [
            (name, site.measured_on)
            for name, site in (("attention", self.attention), ("ffn", self.ffn))
            if self.distills(name) and site.measured_on != "pruned_stream"
        ]
        for name, measured_on in trained:
            return (
                f"distill.sites = {self.distill.sites} trains {name} on what the pruned model has, which "
                f"{name}.measured_on = {measured_on} (method {method}) does not measure; set it to pruned_stream, or "
                "leave distill.sites = none."
            )
        for name, site in (("attention", self.attention), ("ffn", self.ffn)):
            if strategies.REPAIRS[site.repair].splits and site.measured_on != "pruned_stream":
                return (
                    f"{name}.repair = {site.repair} (method {method}) weighs what the site gives against the drift of "
                    f"the pruned stream, which {name}.measured_on = {site.measured_on} does not measure; set it to "
                    "pruned_stream, or take another repair."
                )
        if self.ffn.iter_pca and self.ffn.measured_on != "pruned_stream":
            return (
                f"ffn.iter_pca (method {method}) fits maps to what the pruned model has, which ffn.measured_on = "
                f"{self.ffn.measured_on} does not measure; set it to pruned_stream, or leave iterative PCA off."
            )
        score = strategies.SCORES[self.attention.score]
        if "attention.score" in self.read() and score.head_rules and self.attention.heads not in score.head_rules:
            return (
                f"attention.score = {self.attention.score} (method {method}) ranks heads for attention.heads = "
                f"{' or '.join(score.head_rules)} only, not for {self.attention.heads}; change one of the two."
            )
        return None

    def fitted(self, *, target: str, hidden_size: int, norms_first: bool, one_shape: bool) -> BlockwiseOptions:
        """Return the options as this model can have them.

        K-quants of llama.cpp need rows of a multiple of 256 weights. Where hidden_size is none, most matrices of the
        model cannot have them, and steps as coarse as that would cost quality for nothing. Where norms come after the
        sum with the residual stream, the dense stream is no target for a linear repair: sites use their own output.
        Architectures of llama.cpp that have one shape for all layers have no place for a choice of rotary pairs either,
        so heads stay whole.
        """
        allocation, attention, ffn = self.allocation, self.attention, self.ffn
        if one_shape:
            allocation = replace(allocation, shape_freedom="model")
            attention = replace(attention, min_head_fraction=1.0)
        if target == "llama.cpp" and hidden_size % ffn.ffn_multiple:
            ffn = replace(ffn, ffn_multiple=math.gcd(ffn.ffn_multiple, hidden_size))
        if not norms_first:
            attention = replace(attention, repair_against="own_output")
            ffn = replace(ffn, repair_against="own_output")
        return replace(self, allocation=allocation, attention=attention, ffn=ffn)
