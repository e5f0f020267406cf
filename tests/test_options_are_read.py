"""Every option of every method: giving it changes the weights, or is refused with its name. Nothing is ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from intraslice.errors import BudgetError, RecipeError
from intraslice.methods.registry import METHODS
from intraslice.recipes.merge import flatten
from intraslice.recipes.recipe import Recipe, load_recipe
from support.prune import QUICK, calibration, prune, weights_of

MODELS: dict[str, dict[str, Any]] = {
    # Grouped queries; four layers, so that two are neither the first nor the last.
    "llama": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 4,
        "intermediate_size": 160,
    },
    # Without RoPE.
    "opt": {"num_attention_heads": 4, "num_hidden_layers": 2},
}


SPARSITIES = (0.42, 0.25, 0.6)
"""Tried in turn until the option shows: what a choice of so few heads and channels hides once, it does not always."""


@dataclass(frozen=True)
class Context:
    """Where an option is tried: other options that are given, and the model."""

    options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "llama"


PLAIN = Context()


@dataclass(frozen=True)
class Trial:
    """Values of an option, of which the first one that the method does not have anyway is given; and contexts.

    Every method is tried without a context, and then in each of these that it takes. `beside` are options that are
    read only because this one is given, and that are given with it.
    """

    values: tuple[Any, ...]
    contexts: tuple[Context, ...] = ()
    beside: Mapping[str, Any] = field(default_factory=dict)


def _in(model: str = "llama", **options: Any) -> Context:
    return Context({name.replace("__", "."): value for name, value in options.items()}, model)


_BOTH = (True, False)
_SEARCHED = _in(allocation__rule="search", ffn__ffn_multiple=1)
_SEARCHED_LONG = _in(
    allocation__rule="search",
    ffn__ffn_multiple=1,
    allocation__search_spacing=0.06,
    allocation__search_generations=8,
    allocation__search_offspring=8,
)
# The error of a random FFN falls little by little: larger steps show every setting sooner.
_ITERATED = _in(ffn__iter_pca=True, ffn__iter_pca_lr=1e-2, ffn__iter_pca_steps=4)
# Training changes nothing where it does not help on the sequences held out: without a repair it always does.
_TRAINED = _in(
    distill__sites="ffn",
    distill__learning_rate=0.003,
    ffn__repair="none",
    ffn__repair_against="own_output",
    run__batch_tokens=32,
)
# Small steps nearly always help where nothing was repaired; what one number of them does not show, the other does.
_UNREPAIRED = {"attention__repair": "none", "ffn__repair": "none", "run__batch_tokens": 32}
_TUNED = tuple(
    _in(tune__sites="all", tune__learning_rate=3e-4, tune__epochs=epochs, **_UNREPAIRED) for epochs in (1.0, 6.0)
)
_SHAPED = _in(target="vllm", attention__head_multiple=2, ffn__ffn_multiple=4)
# Blocks of random weights are worth alike: at any price, some go.
_EAGER = {"allocation.max_drop_price": 1e6, "allocation.max_dropped_share": 0.5}
_DROPPED = Context({"allocation.drop_blocks": True, **_EAGER})
TRIALS: dict[str, Trial] = {
    "allocation.rule": Trial(("uniform", "similarity")),
    "allocation.pca_attention": Trial(_BOTH),
    "allocation.pca_ffn": Trial(_BOTH, (_in(ffn__ffn_multiple=1),)),
    "allocation.ffn_share": Trial((0.7,)),
    "allocation.budget_unit": Trial(("units", "weights")),
    "allocation.channel_balance": Trial((0.01,)),
    "allocation.kept_first": Trial((0.4,), (_in(allocation__rule="inner"),)),
    "allocation.kept_last": Trial((0.4,), (_in(allocation__rule="inner"),)),
    "allocation.shots": Trial((3,), (_in(allocation__rule="curvature"),)),
    "allocation.gate_steps": Trial((2,), (_in(allocation__rule="gates"),)),
    "allocation.gate_rate": Trial((0.3,), (_in(allocation__rule="gates"),)),
    "allocation.gate_penalty": Trial((0.1,), (_in(allocation__rule="gates"),)),
    "allocation.search_start": Trial(("mask_gradient",), (_SEARCHED,)),
    "allocation.search_moves": Trial(("any",), (_SEARCHED,)),
    "allocation.search_rounds": Trial((1, 3), (_SEARCHED,)),
    # More levels show only where some site goes beyond the first.
    "allocation.search_levels": Trial((5, 9), (_SEARCHED_LONG,)),
    "allocation.search_spacing": Trial((0.25,), (_SEARCHED,)),
    "allocation.search_generations": Trial((1, 6), (_SEARCHED,)),
    "allocation.search_offspring": Trial((1, 8), (_SEARCHED,)),
    "allocation.kept_layers": Trial((0.5,), (_in(allocation__rule="similarity"),)),
    "allocation.similarity_scale": Trial((100.0,), (_in(allocation__rule="similarity"),)),
    # A cap has an effect only where a site would lose more.
    "allocation.max_site_sparsity": Trial((0.6,), (_in(allocation__ffn_share=1.6),)),
    "allocation.num_channel_groups": Trial((4,), (_in(allocation__pca_ffn=True),)),
    "allocation.shape_freedom": Trial(("layer",)),
    "allocation.drop_blocks": Trial(_BOTH, beside=_EAGER),
    # Of eight blocks, one may go or four; the caps have an effect only on what would go.
    "allocation.max_dropped_share": Trial((0.2,), (_DROPPED,)),
    "allocation.max_drop_price": Trial((1e-9,), (_DROPPED,)),
    "allocation.rotation": Trial(("exact",), (_in(ffn__ffn_multiple=1),)),
    "allocation.gradient_group": Trial((2,), (_in(ffn__ffn_multiple=1),)),
    "attention.heads": Trial(("whole", "adaptive"), (_in(allocation__budget_unit="weights"),)),
    "attention.score": Trial(
        ("fluctuation", "norm"), (_in(allocation__budget_unit="units", attention__gqa_groups="ragged"),)
    ),
    "attention.obs_damping": Trial(
        (50.0,), (_in(attention__score="obs"), _in(attention__score="obs", allocation__rule="uniform"))
    ),
    "attention.basis": Trial(("channels", "pca"), (_in("opt"),)),
    "attention.pair_score": Trial(("energy", "mean_product")),
    "attention.head_budget": Trial(("queries", "weights")),
    "attention.removal_order": Trial(
        ("score", "kept_score"), (_in("opt"), _in("opt", allocation__rule="mask_gradient"))
    ),
    "attention.measured_on": Trial(("dense_stream", "pruned_stream")),
    "attention.qk_width": Trial(("dense", "narrow")),
    "attention.min_head_fraction": Trial((1.0, 0.25)),
    "attention.head_multiple": Trial((2, 4)),
    "attention.context_multiple": Trial((24,), (_SHAPED,)),
    "attention.repair": Trial(("bias", "affine")),
    "attention.damping": Trial((0.7,)),
    "attention.shrink_to": Trial(("zero", "weights")),
    "attention.repair_against": Trial(("own_output", "dense_stream")),
    "attention.damping_scale": Trial(("channel", "mean")),
    "attention.drift_share": Trial((0.5, 1.0)),
    "attention.gqa_groups": Trial(("uniform",)),
    "factors.measured_on": Trial(("pruned_stream",)),
    "ffn.score": Trial(("magnitude", "norm")),
    "ffn.measured_on": Trial(("dense_stream", "dense_layer")),
    "ffn.obs_damping": Trial((50.0,), (_in(ffn__score="obs"),)),
    "ffn.repair": Trial(("bias", "affine")),
    "ffn.damping": Trial((0.7,), (_ITERATED,)),
    "ffn.shrink_to": Trial(("zero", "weights"), (_ITERATED,)),
    "ffn.repair_against": Trial(("own_output", "dense_stream"), (_ITERATED,)),
    "ffn.damping_scale": Trial(("channel", "mean"), (_ITERATED,)),
    "ffn.drift_share": Trial((0.5, 1.0), (_ITERATED,)),
    "ffn.ffn_multiple": Trial((4,)),
    "ffn.iter_pca": Trial(_BOTH, (_in(ffn__score="magnitude"),)),
    "ffn.iter_pca_fraction": Trial((1.0,), (_ITERATED,)),
    "ffn.iter_pca_rounds": Trial((1,), (_ITERATED,)),
    "ffn.iter_pca_slice": Trial((5,), (_ITERATED,)),
    "ffn.iter_pca_steps": Trial((7,), (_ITERATED,)),
    "ffn.iter_pca_lr": Trial((3e-3,), (_ITERATED,)),
    "ffn.iter_pca_most_kept": Trial((0.05,), (_ITERATED,)),
    "ffn.iter_pca_batches": Trial((2,), (_ITERATED,)),
    "ffn.iter_pca_decay": Trial(("halving",), (_ITERATED,)),
    "distill.sites": Trial(("ffn",), (_in(ffn__repair="none"), _TRAINED)),
    "distill.epochs": Trial((8.0,), (_TRAINED,)),
    "distill.learning_rate": Trial((0.001,), (_TRAINED,)),
    "distill.held_out": Trial((0.75,), (_TRAINED,)),
    "tune.sites": Trial(("ffn", "attention"), _TUNED),
    "tune.epochs": Trial((12.0,), _TUNED),
    "tune.learning_rate": Trial((1e-4,), _TUNED),
    "tune.held_out": Trial((0.75,), _TUNED),
}


def _options_of(form: type) -> set[str]:
    sections = {name: hint for name, hint in get_type_hints(form).items() if is_dataclass(hint)}
    own = {item.name for item in fields(form)} - sections.keys()
    return own | {f"{name}.{item.name}" for name, section in sections.items() for item in fields(section)}


ALL = sorted({name for entry in METHODS.values() for name in _options_of(entry.options_class)})


def test_every_option_has_a_trial():
    assert set(TRIALS) == set(ALL)


def _recipe(method: str, options: Mapping[str, Any]) -> Recipe:
    return load_recipe(None, {"model": "m", "method": method, "sparsity": SPARSITIES[0], **options})


def _refusal(method: str, options: Mapping[str, Any]) -> str | None:
    try:
        _recipe(method, options)
    except RecipeError as error:
        return str(error)
    return None


Weights = dict[str, torch.Tensor] | None
Pruner = Callable[[str, str, float, Mapping[str, Any]], Weights]


@pytest.fixture(scope="session")
def pruned(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Pruner:
    """Return a function (model, method, sparsity, options) -> weights; None where the budget cannot be reached."""
    # Baselines are kept, and all runs share their gradient passes.
    gradients, kept = tmp_path_factory.mktemp("gradients"), {}
    text = calibration(4, 32)

    def run(model: str, method: str, sparsity: float, options: Mapping[str, Any]) -> Weights:
        key = (model, method, sparsity, tuple(sorted(options.items())))
        if key in kept:
            return kept[key]
        out = tmp_path_factory.mktemp("out") / "pruned"
        # The defaults of the multiples, unless they are given: the steps that suit tiny models are not the subject.
        multiples = {"attention.head_multiple": None, "ffn.ffn_multiple": None}
        rules = {"curvature": QUICK["llm-surgeon"], "gates": QUICK["disp-llm"], "search": QUICK["tyr"]}
        less = rules.get(str(options.get("allocation.rule")), {})
        given = {**multiples, **less, "run.gradient_folder": str(gradients), **options}
        try:
            prune(tiny_folder(model, **MODELS[model]), out, method, sparsity, on=text, **given)
        except BudgetError:
            kept[key] = None
        else:
            kept[key] = weights_of(out)
        return kept[key]

    return run


def _differ(first: Weights, second: Weights) -> bool:
    if first is None or second is None:
        return first is not second
    return first.keys() != second.keys() or any(
        tensor.shape != second[name].shape or not torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


@pytest.mark.parametrize("option", ALL)
@pytest.mark.parametrize("method", METHODS)
def test_an_option_is_refused_or_changes_the_weights(method: str, option: str, pruned: Pruner):
    refused, read = False, []
    for context in (PLAIN, *TRIALS[option].contexts):
        base = {name: value for name, value in context.options.items() if name != option}
        if option.startswith("tune.") and option != "tune.sites" and method == "intraslice":
            # `prune` leaves it out of the default, to save time.
            base = {"tune.sites": "all", **base}
        if _refusal(method, base) is not None:
            continue  # the method does not take the context
        has = flatten({section: vars(value) for section, value in vars(_recipe(method, base).options).items()})
        value = next(value for value in TRIALS[option].values if has.get(option) != value)
        given = {**base, **TRIALS[option].beside, option: value}
        refusal = _refusal(method, {**base, option: value})
        if refusal is not None:
            assert option in refusal and f"method {method}" in refusal, refusal
            refused = True
        else:
            read.append((context.model, base, given))
    for sparsity in SPARSITIES:
        for model, base, given in read:
            before = pruned(model, method, sparsity, base)
            if before is not None and _differ(before, pruned(model, method, sparsity, given)):
                return
    assert not read, f"{option} is read, but without any effect: {[given for _, _, given in read]}"
    assert refused


@pytest.mark.parametrize("option", ALL)
def test_every_option_is_read_by_some_method(option: str):
    assert any(
        _refusal(method, {**context.options, **TRIALS[option].beside, option: value}) is None
        for method in METHODS
        for context in (PLAIN, *TRIALS[option].contexts)
        for value in TRIALS[option].values
        if _refusal(method, context.options) is None
    )
