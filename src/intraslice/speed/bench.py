"""Speed and memory of saved models: one process per model, repetitions in turns, medians and ratios."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intraslice.checkpoint.folder import weight_files
from intraslice.checkpoint.source import resolve_model
from intraslice.errors import CheckpointError, RecipeError
from intraslice.process import Worker
from intraslice.progress import Progress, SilentProgress
from intraslice.speed.timing import Spread


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is run.

    Attributes:
        prompt_tokens: tokens of a prompt, and so the length of the KV cache when decoding begins.
        decode_tokens: tokens decoded one by one after the prompt.
        batch_size: sequences at a time.
        kv_lengths: several values of prompt_tokens, measured in turns; empty for the one above.
        batch_sizes: several values of batch_size; empty for the one above.
        repetitions: timed repetitions of each model, after one that is not counted.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto", "cpu" or a torch device.
        compile: decode through torch.compile with a static cache; prefill is not compiled.
        trust_remote_code: whether code that comes with a model may be executed.
    """

    prompt_tokens: int = 512
    decode_tokens: int = 64
    batch_size: int = 1
    kv_lengths: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    repetitions: int = 5
    dtype: str = "auto"
    device: str = "auto"
    compile: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "decode_tokens", "batch_size", "repetitions"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("kv_lengths", "batch_sizes"):
            if any(value < 1 for value in getattr(self, name)):
                raise RecipeError(f"{name} must be at least 1, got {', '.join(map(str, getattr(self, name)))}.")

    @property
    def points(self) -> list[tuple[int, int]]:
        """Every (batch size, KV length) to measure, each once, in the order given."""
        lengths, sizes = self.kv_lengths or (self.prompt_tokens,), self.batch_sizes or (self.batch_size,)
        return list(dict.fromkeys((size, length) for size in sizes for length in lengths))


@dataclass(frozen=True, kw_only=True)
class PointSpeed:
    """What a model reaches at one batch size and KV length.

    Attributes:
        batch_size: sequences at a time.
        kv_length: tokens of the prompt, and of the KV cache when decoding begins.
        prefill: prompt tokens per second.
        decode: decoded tokens per second, all sequences of the batch counted.
        kv_cache_bytes: of the cache after the prompt.
    """

    batch_size: int
    kv_length: int
    prefill: Spread
    decode: Spread
    kv_cache_bytes: int


@dataclass(frozen=True, kw_only=True)
class PointRatio:
    """How much faster a model is than its base at one batch size and KV length: medians over medians."""

    batch_size: int
    kv_length: int
    prefill: float
    decode: float


@dataclass(frozen=True, kw_only=True)
class ModelSpeed:
    """What one saved model was measured at; speeds are medians over the repetitions, at the first of `points`.

    Attributes:
        model: as it was named.
        parameters: all parameters, tied ones once.
        weight_bytes: size of the weight files (of a GGUF file: as converted to safetensors).
        dtype: of the loaded weights.
        device: where it ran.
        prefill_tokens_per_second: prompt tokens through one forward pass.
        decode_tokens_per_second: tokens decoded one by one, all sequences of the batch counted.
        kv_cache_bytes_per_token: bytes of the cache's key and value tensors for one token of one sequence.
        peak_memory_bytes: peak resident memory of the process (CPU), or of the accelerator's allocator, over all
            points.
        points: every batch size and KV length.
    """

    model: str
    parameters: int
    weight_bytes: int
    dtype: str
    device: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    kv_cache_bytes_per_token: float
    peak_memory_bytes: int
    points: tuple[PointSpeed, ...]


RATIO_FIELDS = (
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "kv_cache_bytes_per_token",
    "parameters",
    "weight_bytes",
    "peak_memory_bytes",
)


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """One model, and the one it is compared with.

    Attributes:
        model: the model asked for.
        base: the model it is compared with, or None.
        ratio: model / base, by field; above 1 is faster for speeds, and larger for sizes. Empty without base.
        point_ratios: speeds of the model / base, by batch size and KV length. Empty without base.
        options: what was run.
    """

    model: ModelSpeed
    base: ModelSpeed | None
    ratio: dict[str, float]
    point_ratios: tuple[PointRatio, ...]
    options: BenchOptions

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def bench_models(
    model: str,
    against: str | None = None,
    *,
    options: BenchOptions | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure a saved model, and a second one in turns with it.

    Args:
        model: hub id, folder, .gguf file or built-in name.
        against: the base of the ratios.
        options: what to run.
        progress: shows the repetitions.

    Raises:
        CheckpointError: a model cannot be loaded or cannot run this, or its process died.
        RecipeError: an option is out of range.
    """
    options = options or BenchOptions()
    progress = progress or SilentProgress()
    names = [model] if against is None else [model, against]
    # GGUF files are converted here, once, and not inside a process whose memory is measured.
    folders = [resolve_model(name, progress=progress) for name in names]
    with ExitStack() as stack:
        models = [_Model(name, folder, options).load(stack) for name, folder in zip(names, folders, strict=True)]
        # The first repetition warms caches and is not counted.
        points = options.points
        with progress.step("benchmark", (options.repetitions + 1) * len(points) * len(models)) as advance:
            for _ in range(options.repetitions + 1):
                for point in points:
                    for measured in models:
                        measured.repeat(point)
                        advance(1)
    speeds = [measured.speed() for measured in models]
    return BenchResult(
        model=speeds[0],
        base=speeds[1] if len(speeds) == 2 else None,
        ratio=_ratios(speeds),
        point_ratios=_point_ratios(speeds),
        options=options,
    )


def _ratios(speeds: Sequence[ModelSpeed]) -> dict[str, float]:
    if len(speeds) < 2:
        return {}
    first, base = speeds
    pairs = {name: (getattr(first, name), getattr(base, name)) for name in RATIO_FIELDS}
    return {name: value / reference for name, (value, reference) in pairs.items() if value and reference}


def _point_ratios(speeds: Sequence[ModelSpeed]) -> tuple[PointRatio, ...]:
    if len(speeds) < 2:
        return ()
    return tuple(
        PointRatio(
            batch_size=point.batch_size,
            kv_length=point.kv_length,
            prefill=point.prefill.median / base.prefill.median,
            decode=point.decode.median / base.decode.median,
        )
        for point, base in zip(speeds[0].points, speeds[1].points, strict=True)
    )


class _Model:
    """A model in its process, and what was measured of it."""

    def __init__(self, name: str, folder: Path, options: BenchOptions) -> None:
        self._name = name
        self._folder = folder
        self._options = options
        self._worker = Worker(
            "intraslice.speed.worker:serve", name=f"the process that runs {name!r}", error=CheckpointError
        )
        self._loaded: dict[str, Any] = {}
        self._measured: dict[tuple[int, int], list[dict[str, Any]]] = {point: [] for point in options.points}
        self._peak_memory_bytes = 0

    def load(self, stack: ExitStack) -> _Model:
        """Start the process, which ends with `stack`, and load the model in it."""
        stack.enter_context(self._worker)
        longest = max(length for _, length in self._options.points)
        self._loaded = self._worker.ask(
            {"model": str(self._folder), **asdict(self._options), "longest_prompt": longest}
        )
        return self

    def repeat(self, point: tuple[int, int]) -> None:
        batch_size, kv_length = point
        reply = self._worker.ask({"batch_size": batch_size, "kv_length": kv_length})
        self._measured[point].append(reply)
        self._peak_memory_bytes = reply["peak_memory_bytes"]

    def speed(self) -> ModelSpeed:
        points = tuple(self._point(point) for point in self._measured)
        first = points[0]
        return ModelSpeed(
            model=self._name,
            weight_bytes=sum(file.stat().st_size for file in weight_files(self._folder, self._name)),
            peak_memory_bytes=self._peak_memory_bytes,
            prefill_tokens_per_second=first.prefill.median,
            decode_tokens_per_second=first.decode.median,
            kv_cache_bytes_per_token=self._counted((first.batch_size, first.kv_length))[0]["kv_cache_bytes_per_token"],
            points=points,
            **self._loaded,
        )

    def _counted(self, point: tuple[int, int]) -> list[dict[str, Any]]:
        return self._measured[point][1:]

    def _point(self, point: tuple[int, int]) -> PointSpeed:
        batch_size, kv_length = point
        counted = self._counted(point)
        return PointSpeed(
            batch_size=batch_size,
            kv_length=kv_length,
            prefill=Spread.of([repetition["prefill_tokens_per_second"] for repetition in counted]),
            decode=Spread.of([repetition["decode_tokens_per_second"] for repetition in counted]),
            kv_cache_bytes=counted[0]["kv_cache_bytes"],
        )
