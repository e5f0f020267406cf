"""What the engine asks of a method, and what it gives it.

The engine runs the layers in order and knows no method: a method plans, changes one layer at a time, and says what
changes outside of the layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from intraslice.layers.decoder import DecoderLayer
from intraslice.options import RunOptions
from intraslice.placement import Placement
from intraslice.progress import Progress
from intraslice.results.result import Tuned
from intraslice.runtime.families_intraslice import LayerShape
from intraslice.streaming.hidden import HiddenStates, embedded_states
from intraslice.streaming.model import StreamedModel


@dataclass(frozen=True, kw_only=True)
class Context:
    """A run, as a method sees it.

    Attributes:
        model: the dense model, one layer in memory.
        tokens: calibration token ids, [N, T].
        sparsity: fraction of the decoder layers' linear weights to remove.
        run: execution settings.
        folder: where a method may keep files of this run; they are deleted with its work folder.
        identity: what decides the result, by field: the model's fingerprint, the calibration and so on.
        progress: shows the work.
    """

    model: StreamedModel
    tokens: Tensor
    sparsity: float
    run: RunOptions
    folder: Path
    identity: Mapping[str, Any]
    progress: Progress
    _opened: list[HiddenStates] = field(default_factory=list)

    @property
    def placement(self) -> Placement:
        """Device and dtypes."""
        return self.model.placement

    def embedded(
        self, name: str = "hidden", *, model: StreamedModel | None = None, count: int | None = None
    ) -> HiddenStates:
        """Return the hidden states at the input of the first layer.

        Args:
            name: of the file that holds them when they are kept on disk.
            model: whose embeddings are taken; None takes those of the run's model, which are gone after `open`.
            count: of how many sequences, from the first one; None takes all.
        """
        path = self.folder / f"{name}.bin" if self.run.hidden_states == "disk" else None
        self._opened.append(embedded_states(model or self.model, self.tokens[:count], path))
        return self._opened[-1]

    def release(self) -> None:
        """Free all hidden states; the engine calls it after the plan and after the layers."""
        while self._opened:
            self._opened.pop().release()


@dataclass(frozen=True, kw_only=True)
class LayerOutcome:
    """What a method made of a layer.

    Attributes:
        shape: what the layer is now.
        num_weights: its linear weights now.
        errors: by the name of the site, the relative squared error of its output on the calibration tokens.
        heads: kept query heads, by their number in the dense model.
        tensors: what is stored for the layer, by name within it; None stores the layer as it is in memory.
        carry: what the method has to know about finished layers when a run is resumed; JSON types.
        extra: more for the record; JSON types.
    """

    shape: LayerShape
    num_weights: int
    errors: Mapping[str, float]
    heads: tuple[int, ...]
    tensors: dict[str, Tensor] | None = None
    carry: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class FinishedLayers(Protocol):
    """The layers of a run after the last one was changed."""

    def layer_shape(self, index: int) -> LayerShape:
        """Return what a layer is now."""
        ...

    def load_layer(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of a layer as they are stored, by name within it."""
        ...

    def replace_layers(self, layers: Iterable[dict[str, Tensor]]) -> None:
        """Store other tensors of the same names and shapes in the place of those of all layers, first to last."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outside:
    """What is stored besides the decoder layers.

    Attributes:
        tensors: by full name.
        config: fields of the config that are not those of the dense model.
    """

    tensors: dict[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SizeLimits:
    """What a method can make of the size of a model. Everything is an upper bound.

    Attributes:
        most: the largest sparsity.
        slack: linear weights by which a finished model may miss the sparsity that was asked for.
        parameters: what repairs add to a model besides linear weights: biases.
        index_bytes: bytes of the index tensors that are stored with the weights.
        tensors: number of stored tensors that the dense model does not have.
    """

    most: float
    slack: float = 0.0
    parameters: int = 0
    index_bytes: int = 0
    tensors: int = 0


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What is known of a prune before it runs.

    Attributes:
        reads_gradients: whether there is a gradient pass.
        outside_parameters: parameters outside of the decoder layers afterwards; None when they stay what they are.
        held_numbers: numbers of four bytes that are in memory at once for all layers, beside what every method needs.
    """

    reads_gradients: bool = False
    outside_parameters: int | None = None
    held_numbers: int = 0


class Method(Protocol):
    """A way to make the layers of a model smaller. `State` is whatever the method carries from layer to layer."""

    @property
    def resumes(self) -> bool:
        """Whether finished layers of an interrupted run can be used; otherwise they are made again."""
        ...

    def preview(self, dense: Any, sparsity: float) -> Preview:
        """Say what a run would do, from the `ModelInfo` of the dense model alone."""
        ...

    def plan(self, context: Context) -> dict[str, Any]:
        """Return what is decided for all layers before the first one changes; JSON types. May measure the model.

        Raises:
            BudgetError: the sparsity cannot be reached.
        """
        ...

    def plan_seconds(self, context: Context) -> float:
        """Return the seconds that measurements kept by other runs have cost, which `plan` will not repeat."""
        ...

    def open(self, context: Context, plan: dict[str, Any], carry: Any) -> Any:
        """Return the state before the first layer; afterwards embeddings and head are no longer in memory.

        Args:
            context: the run.
            plan: what `plan` returned.
            carry: of the last finished layer when a run is resumed; None otherwise.
        """
        ...

    def layer(self, context: Context, state: Any, index: int, layer: DecoderLayer) -> LayerOutcome:
        """Change the layer in place, and advance the state through it.

        Raises:
            NumericalError: activations are NaN or infinite, or a system cannot be solved.
        """
        ...

    def replay(self, context: Context, state: Any, index: int, layer: DecoderLayer) -> None:
        """Advance the state through a finished layer."""
        ...

    def tune(self, context: Context, layers: FinishedLayers) -> Tuned | None:
        """Train all layers together, after the last one; None when the method does not."""
        ...

    def finish(self, context: Context, state: Any, outside: dict[str, Tensor]) -> Outside:
        """Return what is stored outside of the decoder layers.

        Args:
            context: the run.
            state: after the last layer.
            outside: tensors of the dense model, by full name; a tied head is left out.
        """
        ...
