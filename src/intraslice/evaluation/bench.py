"""Speed and memory of saved models: a process for each, interleaved repetitions, medians, ratios."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intraslice.checkpoint.folder import weight_files
from intraslice.checkpoint.source import resolve_model
from intraslice.errors import CheckpointError, RecipeError
from intraslice.progress import Progress, SilentProgress


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is run.

    Attributes:
        prompt_tokens: tokens of a prompt.
        decode_tokens: tokens decoded one by one after the prompt.
        batch_size: sequences at a time.
        repetitions: timed repetitions of each model, after one that is not counted.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto", "cpu" or a torch device.
        compile: decode through torch.compile with a static cache; prefill is not compiled.
        trust_remote_code: whether code that comes with a model may be executed.
    """

    prompt_tokens: int = 512
    decode_tokens: int = 64
    batch_size: int = 1
    repetitions: int = 5
    dtype: str = "auto"
    device: str = "auto"
    compile: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "decode_tokens", "batch_size", "repetitions"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class ModelSpeed:
    """What one saved model was measured at; speeds are medians over the repetitions.

    Attributes:
        model: as it was named.
        parameters: all parameters, tied ones once.
        weight_bytes: size of the weight files (of a GGUF file: as converted to safetensors).
        dtype: of the loaded weights.
        device: where it ran.
        prefill_tokens_per_second: prompt tokens through one forward pass.
        decode_tokens_per_second: tokens decoded one by one, all sequences of the batch counted.
        kv_cache_bytes_per_token: bytes of the cache's key and value tensors for one token of one sequence.
        peak_memory_bytes: peak resident memory of the process (CPU), or of the accelerator's allocator.
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
        options: what was run.
    """

    model: ModelSpeed
    base: ModelSpeed | None
    ratio: dict[str, float]
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
        workers = [
            stack.enter_context(_Worker(name, folder, options)) for name, folder in zip(names, folders, strict=True)
        ]
        # The first repetition warms caches and is not counted.
        with progress.step("benchmark", (options.repetitions + 1) * len(workers)) as advance:
            for _ in range(options.repetitions + 1):
                for worker in workers:
                    worker.repeat()
                    advance(1)
    speeds = [worker.speed() for worker in workers]
    base = speeds[1] if len(speeds) == 2 else None
    return BenchResult(model=speeds[0], base=base, ratio=_ratios(speeds), options=options)


def _ratios(speeds: Sequence[ModelSpeed]) -> dict[str, float]:
    if len(speeds) < 2:
        return {}
    first, base = speeds
    pairs = {name: (getattr(first, name), getattr(base, name)) for name in RATIO_FIELDS}
    return {name: value / reference for name, (value, reference) in pairs.items() if value and reference}


class _Worker:
    """The process of one model."""

    def __init__(self, name: str, folder: Path, options: BenchOptions) -> None:
        self._name = name
        self._folder = folder
        self._options = options
        self._loaded: dict[str, Any] = {}
        self._repetitions: list[dict[str, Any]] = []

    def __enter__(self) -> _Worker:
        # A file and not a pipe: nobody reads it until the process has died, and a full pipe would block it.
        self._messages = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "intraslice.evaluation.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
        )
        try:
            self._loaded = self._ask({"model": str(self._folder), **asdict(self._options)})
        except CheckpointError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._messages.close()

    def repeat(self) -> None:
        self._repetitions.append(self._ask({}))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None and replies is not None
        try:
            requests.write(json.dumps(request) + "\n")
            requests.flush()
            line = replies.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise CheckpointError(f"the process that runs {self._name!r} died: {self._last_message()}")
        reply = json.loads(line)
        if "error" in reply:
            raise CheckpointError(reply["error"])
        return reply

    def _last_message(self) -> str:
        status = self._process.wait()
        self._messages.seek(0)
        lines = [line.strip() for line in self._messages if line.strip()]
        return lines[-1] if lines else f"exit status {status}"

    def speed(self) -> ModelSpeed:
        counted = self._repetitions[1:]
        medians: dict[str, Any] = {
            field: statistics.median(repetition[field] for repetition in counted)
            for field in ("prefill_tokens_per_second", "decode_tokens_per_second", "kv_cache_bytes_per_token")
        }
        return ModelSpeed(
            model=self._name,
            weight_bytes=sum(file.stat().st_size for file in weight_files(self._folder, self._name)),
            peak_memory_bytes=self._repetitions[-1]["peak_memory_bytes"],
            **self._loaded,
            **medians,
        )
