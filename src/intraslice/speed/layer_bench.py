"""Speed of the decoder layers of a saved model, each alone; Paper: Figures 4 and 10.

Embeddings, head and sampling are left out. Layers of one shape are measured once, with the weights of the first of
them, in turns with all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from intraslice.errors import RecipeError
from intraslice.inspection import family_of
from intraslice.loading import load_model
from intraslice.placement import Placement, dtype_name
from intraslice.progress import Progress, SilentProgress
from intraslice.runtime.configuration_intraslice import dense_config, dense_shape, dense_shapes
from intraslice.runtime.families_intraslice import LayerShape
from intraslice.speed.bench import BenchOptions
from intraslice.speed.layer_speed import LayerHost, one_layer_model
from intraslice.speed.timing import Spread

PAPER_TOKENS = 4096
"""Length of the prompt, and of the KV cache of a decode step, in the paper's measurements."""


@dataclass(frozen=True, kw_only=True)
class LayerSpeed:
    """One layer shape.

    Attributes:
        shape: its heads, widths and channels.
        layers: the layers that have it.
        parameters: all weights of one of them.
        prefill_seconds: of the prompt through one layer.
        decode_seconds: of one token through one layer, with a cache of the prompt's length before it.
        kv_cache_bytes_per_token: of one layer, for one sequence.
    """

    shape: LayerShape
    layers: tuple[int, ...]
    parameters: int
    prefill_seconds: Spread
    decode_seconds: Spread
    kv_cache_bytes_per_token: float


@dataclass(frozen=True, kw_only=True)
class LayersSpeed:
    """All layers of a model.

    Attributes:
        model: as it was named.
        random_weights: whether the weights are random, because no dense model was given.
        shapes: the distinct shapes, in the order of their first layers.
        prefill_seconds: sum over all layers of the medians.
        decode_seconds: the same for one token.
    """

    model: str
    random_weights: bool
    shapes: tuple[LayerSpeed, ...]
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, kw_only=True)
class LayerBenchResult:
    """The layers of a model, and those of the dense model.

    Attributes:
        model: the model asked for.
        base: what it is compared with: the model named, else the dense shape with random weights; None for a
            dense model that is compared with nothing.
        speedup: seconds of the base over seconds of the model, for "prefill" and "decode"; empty without base.
        dtype, device: of the measurement.
        options: what was run.
    """

    model: LayersSpeed
    base: LayersSpeed | None
    speedup: dict[str, float]
    dtype: str
    device: str
    options: BenchOptions

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def bench_layers(
    model: str,
    against: str | None = None,
    *,
    options: BenchOptions | None = None,
    progress: Progress | None = None,
) -> LayerBenchResult:
    """Measure every distinct layer shape of a saved model and the dense one, in turns.

    Args:
        model: hub id, folder, .gguf file or built-in name.
        against: the dense model; its shape with random weights unless given.
        options: what to run, at one batch size and KV length; 4096 tokens unless given.
        progress: shows the repetitions.

    Raises:
        CheckpointError: a model cannot be loaded.
        UnsupportedModelError: its architecture is not one of ours.
        RecipeError: an option is out of range, or the model has no positions for so many tokens.
    """
    options = options or BenchOptions(prompt_tokens=PAPER_TOKENS)
    progress = progress or SilentProgress()
    if len(options.points) > 1 or options.compile:
        raise RecipeError(
            "single layers are measured at one batch size and one KV length, without --compile; leave out the others."
        )
    models = [_load(model, options, progress)]
    if against is not None:
        models.append(_load(against, options, progress))
    elif models[0].pruned:
        models.append(_dense(models[0]))
    shapes = [shape for entry in models for shape in entry.shapes]
    # The first repetition warms up and is not counted.
    with progress.step("benchmark", (options.repetitions + 1) * len(shapes)) as advance:
        for _ in range(options.repetitions + 1):
            for shape in shapes:
                shape.repeat(options)
                advance(1)
    speeds = [entry.speed() for entry in models]
    base = speeds[1] if len(speeds) == 2 else None
    speedup = {}
    if base is not None:
        speedup["prefill"] = base.prefill_seconds / speeds[0].prefill_seconds
        speedup["decode"] = base.decode_seconds / speeds[0].decode_seconds
    placement = models[0].host.placement
    return LayerBenchResult(
        model=speeds[0],
        base=base,
        speedup=speedup,
        dtype=dtype_name(placement.compute_dtype),
        device=placement.device.type,
        options=options,
    )


@dataclass
class _Shape:
    """A layer that stands for all layers of its shape, and what was measured."""

    host: LayerHost
    module: nn.Module
    shape: LayerShape
    layers: list[int]
    kv_cache_bytes_per_token: float = 0.0
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def repeat(self, options: BenchOptions) -> None:
        ((batch_size, length),) = options.points
        index, cache = self.layers[0], self.host.empty_cache()
        prompt = self.host.tokens(batch_size, length)
        self.prefill.append(self.host.layer_seconds(index, self.module, prompt, cache))
        kept = cache.layers[index]
        self.kv_cache_bytes_per_token = sum(
            tensor.numel() * tensor.element_size() / (batch_size * tensor.shape[-2])  # [B, K, T, d]
            for tensor in (kept.keys, kept.values)
            if tensor is not None
        )
        self.decode.append(self.host.step_seconds(index, self.module, cache, batch_size, options.decode_tokens))

    def speed(self) -> LayerSpeed:
        return LayerSpeed(
            shape=self.shape,
            layers=tuple(self.layers),
            parameters=sum(parameter.numel() for parameter in self.module.parameters()),
            prefill_seconds=Spread.of(self.prefill[1:]),
            decode_seconds=Spread.of(self.decode[1:]),
            kv_cache_bytes_per_token=self.kv_cache_bytes_per_token,
        )


@dataclass
class _Model:
    """A model whose layers are measured."""

    name: str
    host: LayerHost
    shapes: list[_Shape]
    pruned: bool
    random_weights: bool = False

    def speed(self) -> LayersSpeed:
        shapes = tuple(shape.speed() for shape in self.shapes)
        return LayersSpeed(
            model=self.name,
            random_weights=self.random_weights,
            shapes=shapes,
            prefill_seconds=sum(len(shape.layers) * shape.prefill_seconds.median for shape in shapes),
            decode_seconds=sum(len(shape.layers) * shape.decode_seconds.median for shape in shapes),
        )


def _load(name: str, options: BenchOptions, progress: Progress) -> _Model:
    model, _ = load_model(
        name,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        progress=progress,
    )
    config: Any = model.config
    spec = family_of(config)
    ((_, length),) = options.points
    wanted, limit = length + options.decode_tokens, config.max_position_embeddings
    # Rotary positions go on for ever; what comes out means little there, but takes as long.
    if not spec.rope and wanted > limit:
        raise RecipeError(
            f"prompt and decoded tokens are {wanted}, but {name!r} has learned only {limit} positions; "
            f"use --prompt-tokens {max(1, limit - options.decode_tokens)} or less."
        )
    host = LayerHost(model, spec.layers, Placement(model.device, model.dtype, model.dtype, torch.float32))
    pruned = config.model_type != spec.name
    shapes = config.layer_shapes if pruned else dense_shapes(config, spec)
    return _Model(name, host, _distinct(host, shapes), pruned)


def _distinct(host: LayerHost, shapes: Sequence[LayerShape]) -> list[_Shape]:
    """Return one layer for each set of tensor shapes; the host lets go of the others."""
    found: dict[tuple[Any, ...], _Shape] = {}
    for index, (module, shape) in enumerate(zip(host.layers, shapes, strict=True)):
        key = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
        if key in found:
            found[key].layers.append(index)
        else:
            found[key] = _Shape(host, module, shape, [index])
    host.layers.clear()
    return list(found.values())


def _dense(pruned: _Model) -> _Model:
    """Return the dense shape of a pruned model, with random weights."""
    config = dense_config(pruned.host.config)
    spec = family_of(config)
    host = LayerHost(one_layer_model(config, pruned.host.placement), spec.layers, pruned.host.placement)
    (shape,) = _distinct(host, [dense_shape(config, spec)])
    layers = sorted(layer for entry in pruned.shapes for layer in entry.layers)
    return _Model("dense shape", host, [_Shape(host, shape.module, shape.shape, layers)], False, random_weights=True)
