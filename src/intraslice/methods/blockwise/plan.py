"""How much each site may lose: measures what the allocation rule asks for, and runs it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from intraslice.errors import RecipeError
from intraslice.layers.decoder import blocks_are_parallel
from intraslice.layers.sites import ATTENTION, FFN
from intraslice.methods.base import Context
from intraslice.methods.blockwise.allocators.base import Allocation, count_units
from intraslice.methods.blockwise.allocators.drop import choose_dropped
from intraslice.methods.blockwise.allocators.mask_gradient import MaskGradients
from intraslice.methods.blockwise.allocators.shapes import ShapeGrid, allocate_shapes
from intraslice.methods.blockwise.allocators.uniform import allocate_uniform
from intraslice.methods.blockwise.curvature_pass import SHOTS_VERSION, costs_in_shots, unit_costs
from intraslice.methods.blockwise.divergence_pass import DIVERGENCE_VERSION, measure_divergences
from intraslice.methods.blockwise.gate_pass import GATES_VERSION, learn_gates
from intraslice.methods.blockwise.gradient_pass import PASS_VERSION, measure_gradients
from intraslice.methods.blockwise.options import BlockwiseOptions
from intraslice.methods.blockwise.profile_pass import profile_layers
from intraslice.methods.blockwise.search_pass import SEARCH_VERSION, Keep, SearchRun, search_levels
from intraslice.methods.blockwise.strategies import ALLOCATION_RULES, SCORES
from intraslice.methods.blockwise.weight_gradients import measure_taylor
from intraslice.methods.choices import option_values
from intraslice.streaming.model import StreamedModel


def reads_gradients(options: BlockwiseOptions, sparsity: float) -> bool:
    """Return whether gradients go down through the model."""
    of_scores, measures = measured_for_scores(options, sparsity), options.rule.measures
    if measures == "levels":
        measures = ALLOCATION_RULES[options.allocation.search_start].measures
    return bool(of_scores) or (measures in ("gradients", "curvature", "gates") and sparsity > 0)


def measured_for_scores(options: BlockwiseOptions, sparsity: float) -> dict[str, str]:
    """Return what scores ask to have measured before the first layer changes, by the kind of the site."""
    if sparsity == 0:
        return {}
    read, chosen = options.read(), {ATTENTION: options.attention.score, FFN: options.ffn.score}
    measured = {kind: SCORES[score].measures for kind, score in chosen.items() if f"{kind}.score" in read}
    return {kind: what for kind, what in measured.items() if what}


def measures_curvature(options: BlockwiseOptions, sparsity: float) -> bool:
    """Return whether the gradients at the outputs of all sites are measured, for the rule or for a score."""
    of_scores = "curvature" in measured_for_scores(options, sparsity).values()
    return of_scores or (options.rule.measures == "curvature" and sparsity > 0)


def fires_shots(options: BlockwiseOptions, sparsity: float) -> bool:
    """Return whether units go before the layers are pruned, so that they are no longer those of the checkpoint."""
    return options.rule.measures == "curvature" and options.allocation.shots > 1 and sparsity > 0


def rotates_exactly(options: BlockwiseOptions) -> bool:
    """Return whether the gradient pass differentiates masks on directions."""
    return "allocation.rotation" in options.read() and options.allocation.rotation == "exact"


def measured_path(context: Context, options: BlockwiseOptions) -> Path | None:
    """Return the file of what the plan measures: of this run, or one that is kept for all runs that would repeat it.

    A kept one is named by everything that decides it, and nothing else. None where nothing is measured that is worth
    keeping.
    """
    measures = options.rule.measures
    if context.sparsity == 0 or measures not in _DIGESTS:
        return None
    if not context.run.gradient_folder:
        return context.folder / f"{measures}.safetensors"
    return Path(context.run.gradient_folder) / f"{measures}-{_DIGESTS[measures](context, options)[:32]}.safetensors"


def gradient_digest(context: Context, options: BlockwiseOptions) -> str:
    """Return a sha256 of everything that decides the gradient pass."""
    decides: dict[str, Any] = {"num_channel_groups": options.allocation.num_channel_groups, "version": PASS_VERSION}
    if rotates_exactly(options):
        decides["rotated"] = True
    return _digest(context, decides)


def divergence_digest(context: Context, options: BlockwiseOptions) -> str:
    """Return a sha256 of everything that decides what the losses of the sites cost."""
    return _digest(context, {**_decided(context, options), "version": DIVERGENCE_VERSION})


def gates_digest(context: Context, options: BlockwiseOptions) -> str:
    """Return a sha256 of everything that decides what gates learn."""
    names = ("gate_steps", "gate_rate", "gate_penalty")
    learning = {name: getattr(options.allocation, name) for name in names}
    return _digest(context, {"sparsity": context.sparsity, **learning, "version": GATES_VERSION})


def search_digest(context: Context, options: BlockwiseOptions) -> str:
    """Return a sha256 of everything that decides what a search finds."""
    return _digest(context, {**_decided(context, options), "version": SEARCH_VERSION})


def shots_digest(context: Context, options: BlockwiseOptions) -> str:
    """Return a sha256 of everything that decides what the shots leave."""
    return _digest(context, {**_decided(context, options), "version": SHOTS_VERSION})


def _decided(context: Context, options: BlockwiseOptions) -> dict[str, Any]:
    names = options.read()
    read = {name: value for name, value in option_values(options).items() if name in names}
    return {"sparsity": context.sparsity, "options": read}


def _digest(context: Context, decides: Mapping[str, Any]) -> str:
    names = ("model", "device", "batch_tokens", "compute", "matmul")
    of_run = {name: context.identity[name] for name in names}
    of_run["tokens"] = context.identity["calibration"]["fingerprint"]
    return hashlib.sha256(json.dumps({**of_run, **decides}, sort_keys=True).encode()).hexdigest()


_DIGESTS = {
    "gradients": gradient_digest,
    "divergences": divergence_digest,
    "gates": gates_digest,
    "levels": search_digest,
}


def allocate(context: Context, options: BlockwiseOptions) -> Allocation:
    """Return what each site keeps, by the allocation rule that the options name.

    Args:
        context: the run.
        options: of the method.

    Raises:
        BudgetError: the sparsity cannot be reached under the cap.
        RecipeError: the shapes are not free, and the dense layers are not alike.
        NumericalError: activations or gradients are NaN or infinite.
    """
    model, rules = context.model, options.allocation
    if rules.drop_blocks and blocks_are_parallel(model.spec, model.config):
        raise RecipeError(
            f"allocation.drop_blocks was asked for, but attention and FFN of a {model.spec.name} layer run side by "
            "side, so that neither can make up for the other; leave every layer its blocks."
        )
    units = count_units(model.sites, context.sparsity, rules)
    grid = _shape_grid(model, options)
    if context.sparsity == 0:
        return units.to_weight_fractions(allocate_uniform(None, units.sites, units.sparsity, rules))
    measured = _measure(context, options)
    sites, sparsity = model.sites, context.sparsity
    if rules.drop_blocks and isinstance(measured, MaskGradients):
        dropped = choose_dropped(measured, sites, sparsity, rules)
        _say_dropped(context, dropped, rules.max_dropped_share)
        sites = sites.without(dropped)
        sparsity = max(0.0, 1.0 - (1.0 - sparsity) * model.sites.num_weights / sites.num_weights)
        units = count_units(sites, sparsity, rules)
    if grid is None:
        allocation = options.rule.load()(measured, units.sites, units.sparsity, rules)
        return units.to_weight_fractions(allocation).with_dropped(model.sites)
    assert isinstance(measured, MaskGradients), "the recipe refuses other rules where shapes are not free"
    allocation = allocate_shapes(measured, sites, sparsity, rules, grid).with_dropped(model.sites)
    context.progress.note(
        f"allocation.shape_freedom = {rules.shape_freedom} keeps {allocation.kept_importance:.1%} of the channels' "
        f"importance; free shapes would keep {allocation.free_importance:.1%}"
    )
    return allocation


def with_unit_scores(context: Context, options: BlockwiseOptions, allocation: Allocation) -> Allocation:
    """Return an allocation with what the scores of units read, and nothing else of that kind.

    Raises:
        NumericalError: activations or gradients are NaN or infinite.
    """
    wanted = measured_for_scores(options, context.sparsity)
    if not wanted:
        return replace(allocation, unit_scores=None)
    found: dict[str, Sequence[Mapping[str, Sequence[float]]]] = {}
    if "weights" in wanted.values():
        found["weights"] = measure_taylor(
            context.model,
            context.tokens,
            boundary_bytes=context.run.boundary_bytes,
            progress=context.progress,
        )
    if "curvature" in wanted.values():
        # A rule that has measured the same leaves it in the allocation.
        found["curvature"] = allocation.unit_scores or unit_costs(context, options)
    scores = tuple(
        {site.name: found[wanted[site.kind]][layer][site.name] for site in sites if site.kind in wanted}
        for layer, sites in enumerate(context.model.sites.layers)
    )
    return replace(allocation, unit_scores=scores)


def _measure(context: Context, options: BlockwiseOptions) -> Any:
    """Return what the allocation rule reads of the dense model; None where that is nothing."""
    model, measures = context.model, options.rule.measures
    if measures == "profile":
        return profile_layers(model, context.embedded(), context.progress)
    if measures == "curvature":
        return costs_in_shots(context, options, shots_digest(context, options))
    path = measured_path(context, options)
    if path is None:
        return None
    kept: dict[str, Any] = {
        "boundary_bytes": context.run.boundary_bytes,
        "save_path": path,
        "measured": _DIGESTS[measures](context, options),
        "progress": context.progress,
    }
    if measures == "levels":
        run = SearchRun(folder=context.folder / "levels", **kept)
        return search_levels(model, context.tokens, lambda: _search_start(context, options), options, run)
    if measures == "gates":
        return learn_gates(model, context.tokens, context.sparsity, options.allocation, **kept)
    if measures == "divergences":
        return measure_divergences(model, context.tokens, context.sparsity, options, **kept)
    return measure_gradients(
        model,
        context.tokens,
        num_channel_groups=options.allocation.num_channel_groups,
        rotated=rotates_exactly(options),
        **kept,
    )


def _search_start(context: Context, options: BlockwiseOptions) -> Keep:
    """Return what each site keeps before a search begins."""
    rules = replace(options.allocation, rule=options.allocation.search_start)
    return allocate(context, replace(options, allocation=rules)).keep


def _say_dropped(context: Context, dropped: Sequence[tuple[int, str]], share: float) -> None:
    count = sum(map(len, context.model.sites.layers))
    by_name: dict[str, list[int]] = {}
    for layer, name in sorted(dropped):
        by_name.setdefault(name, []).append(layer)
    what = " and ".join(f"{name} of {', '.join(map(str, layers))}" for name, layers in by_name.items())
    context.progress.note(
        f"allocation.drop_blocks: {len(dropped)} of {count} blocks go (at most {share:.0%} may)"
        + (f": {what}" if what else "; thinning is better everywhere")
    )


def _shape_grid(model: StreamedModel, options: BlockwiseOptions) -> ShapeGrid | None:
    """Return the shapes that the options allow, or None when they are free."""
    freedom, attention = options.allocation.shape_freedom, options.attention
    if freedom == "free":
        return None
    dense = model.dense_shapes[0]
    if any(shape != dense for shape in model.dense_shapes):
        raise RecipeError(
            f"allocation.shape_freedom = {freedom} was asked for, but the layers of this model have different sizes "
            "before pruning; use allocation.shape_freedom = free."
        )
    head_dim = dense.qk_head_dim
    least = max(attention.head_multiple, attention.min_head_fraction * head_dim)
    widths = [w for w in range(attention.head_multiple, head_dim, attention.head_multiple) if w >= least]
    if attention.heads != "adaptive" or (freedom != "layer" and not model.can_share_pairs):
        widths = []
    return ShapeGrid(
        num_key_value_heads=dense.num_key_value_heads,
        hidden_size=model.config.hidden_size,
        num_ffn_matrices=model.spec.num_ffn_matrices,
        widths=(*widths, head_dim),
        context_multiple=attention.context_multiple,
        ffn_multiple=options.ffn.ffn_multiple,
        heads_divide_hidden=freedom == "model" and model.heads_divide_hidden,
    )
