"""Block-wise pruning as the engine runs it: heads and channels of each site become fewer or narrower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from intraslice.algebra.selection import TOLERANCE
from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.sites import FFN
from intraslice.methods.base import Context, FinishedLayers, LayerOutcome, Outside, Preview
from intraslice.methods.blockwise.allocators.base import Allocation
from intraslice.methods.blockwise.budget import Budget
from intraslice.methods.blockwise.curvature_pass import go_on_after_shots
from intraslice.methods.blockwise.distill import num_held_out
from intraslice.methods.blockwise.gradient_pass import pass_seconds
from intraslice.methods.blockwise.layer import LayerPlan, prune_layer
from intraslice.methods.blockwise.options import BlockwiseOptions
from intraslice.methods.blockwise.plan import (
    allocate,
    fires_shots,
    measured_path,
    measures_curvature,
    reads_gradients,
    shots_digest,
    with_unit_scores,
)
from intraslice.methods.blockwise.strategies import TUNED_KINDS
from intraslice.methods.blockwise.tune import tune
from intraslice.results.result import Tuned
from intraslice.streaming.hidden import Streams
from intraslice.streaming.propagate import propagate_layer


@dataclass
class _State:
    """What goes from layer to layer."""

    allocation: Allocation
    budget: Budget
    streams: Streams
    iterated: set[int]
    dense_weights: int


class Blockwise:
    """A composition of the parts in strategies.py.

    Args:
        options: which parts, and their settings.
    """

    resumes = True

    def __init__(self, options: BlockwiseOptions) -> None:
        self._options = options

    def preview(self, dense: Any, sparsity: float) -> Preview:
        """Say whether there is a gradient pass, and what is held of all layers at once."""
        held = 0
        if measures_curvature(self._options, sparsity):
            # The second moment of the gradients at the output of attention and FFN.
            held = 2 * len(dense.layers) * dense.hidden_size**2
        elif self._options.rule.measures == "gates" and sparsity > 0:
            held = dense.layer_parameters
        return Preview(reads_gradients=reads_gradients(self._options, sparsity), held_numbers=held)

    def plan(self, context: Context) -> dict[str, Any]:
        """Return the allocation.

        Raises:
            BudgetError: the sparsity cannot be reached under the cap, or with the widths that there are.
        RecipeError: there is too little calibration text to hold some out.
            NumericalError: activations or gradients are NaN or infinite.
        """
        if self._options.distill.sites != "none":
            num_held_out(self._fitted_batches(context), self._options.distill.held_out)
        allocation = allocate(context, self._options)
        Budget(context.model.sites, allocation, self._options).check(context.sparsity)
        return with_unit_scores(context, self._options, allocation).to_dict()

    def plan_seconds(self, context: Context) -> float:
        """Return what a kept gradient pass, or kept divergences, have cost."""
        path = measured_path(context, self._options)
        return 0.0 if path is None else pass_seconds(path)

    def open(self, context: Context, plan: dict[str, Any], carry: Any) -> _State:
        """Return the streams at the input of the first layer, and the budget.

        Raises:
            CheckpointError: what the plan has left in the work folder is damaged.
        """
        if fires_shots(self._options, context.sparsity):
            go_on_after_shots(context, shots_digest(context, self._options))
        allocation = Allocation.from_dict(plan)
        sites = (self._options.attention, self._options.ffn)
        # Where norms come after the sum there is no plain sum to repair: those layouts use the site's own output.
        needs_dense = any(site.repair_against == "dense_stream" for site in sites) and context.model.norm_first
        needs_dense = needs_dense or any(site.measured_on == "dense_stream" for site in sites)
        fitted = self._fitted_batches(context) * context.model.batch_shape[0]
        streams = Streams(
            pruned=context.embedded(count=fitted),
            dense=context.embedded("hidden-dense", count=fitted) if needs_dense else None,
        )
        return _State(
            allocation=allocation,
            budget=Budget(context.model.sites, allocation, self._options, carry or 0.0),
            streams=streams,
            iterated=self._layers_to_iterate(allocation.fractions(FFN)),
            dense_weights=context.model.sites.num_weights,
        )

    def _layers_to_iterate(self, ffn_fractions: Sequence[float]) -> set[int]:
        """Return the layers whose FFN loses the most: the share of layers that iter_pca_fraction names."""
        if not self._options.ffn.iter_pca:
            return set()
        ffn = self._options.ffn
        count = max(1, round(ffn.iter_pca_fraction * len(ffn_fractions)))
        # An FFN that goes as a whole keeps nothing to iterate on.
        kept = [index for index, fraction in enumerate(ffn_fractions) if 0.0 < fraction <= ffn.iter_pca_most_kept]
        return set(sorted(kept, key=lambda index: (ffn_fractions[index], index))[:count])

    def layer(self, context: Context, state: _State, index: int, layer: DecoderLayer) -> LayerOutcome:
        """Prune the layer in place, and advance the streams through it."""
        heads = state.allocation.heads
        plan = LayerPlan(
            iter_pca=index in state.iterated,
            heads=None if heads is None else heads[index],
            rope_pairs=state.allocation.rope_pairs,
            dropped=state.allocation.dropped(index),
            unit_scores=None if state.allocation.unit_scores is None else state.allocation.unit_scores[index],
        )
        pruned = prune_layer(context.model, layer, index, state.streams, state.budget, plan, self._options)
        num_weights = context.model.spec.num_parameters(pruned.shape, context.model.config.hidden_size)
        if index == context.model.num_layers - 1:
            self._say_when_missed(context, state)
        return LayerOutcome(
            shape=pruned.shape,
            num_weights=num_weights,
            errors=pruned.errors,
            heads=pruned.heads,
            carry=state.budget.carry,
            extra={
                "iter_pca": plan.iter_pca,
                "distilled": {name: (found.before, found.after) for name, found in pruned.distilled.items()},
            },
        )

    def _say_when_missed(self, context: Context, state: _State) -> None:
        missed = state.budget.carry / state.dense_weights
        if abs(missed) > TOLERANCE:
            context.progress.note(
                f"sparsity {context.sparsity + missed:.4f} is reached instead of {context.sparsity:g}: on a model this "
                f"small, channels in steps of ffn.ffn_multiple = {self._options.ffn.ffn_multiple} come no nearer."
            )

    def replay(self, context: Context, state: _State, index: int, layer: DecoderLayer) -> None:
        """Advance the streams through a finished layer."""
        propagate_layer(layer, state.streams.pruned)
        if state.streams.dense is not None:
            propagate_layer(context.model.load_layer(index), state.streams.dense)

    def tune(self, context: Context, layers: FinishedLayers) -> Tuned | None:
        """Train all layers together towards the predictions of the dense model, if the options say so."""
        if not self._tunes(context):
            if self._options.tune.sites != "none" and context.sparsity > 0:
                # Not refused: a default has to take any text.
                context.progress.note(
                    "the layers are not tuned, which takes two batches of calibration text, one to train on and one to "
                    "judge by; give more --num-samples, or lower run.batch_tokens."
                )
            return None
        return tune(context, layers, TUNED_KINDS[self._options.tune.sites], self._options.tune)

    def _fitted_batches(self, context: Context) -> int:
        """Return how many batches the layers are fitted to: what judges their training must be new to them."""
        count = _num_batches(context)
        return count - num_held_out(count, self._options.tune.held_out) if self._tunes(context) else count

    def _tunes(self, context: Context) -> bool:
        """Say whether all layers are trained together; with one batch of text there would be nothing to judge by."""
        return self._options.tune.sites != "none" and context.sparsity > 0 and _num_batches(context) > 1

    def finish(self, context: Context, state: _State, outside: dict[str, Tensor]) -> Outside:
        """Return what is stored outside of the decoder layers: what the dense model has."""
        return Outside(tensors=outside)


def _num_batches(context: Context) -> int:
    return -(-len(context.tokens) // context.model.batch_shape[0])
