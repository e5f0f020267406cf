"""`intraslice bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from intraslice.cli.console import ConsoleProgress, print_line, print_table, write_json
from intraslice.errors import RecipeError
from intraslice.numbers import count, size

if TYPE_CHECKING:
    from intraslice.speed.bench import BenchOptions, BenchResult
    from intraslice.speed.layer_bench import LayerBenchResult, LayersSpeed
    from intraslice.speed.timing import Spread


MAX_DIGITS = 9
"""Of a number in a list; no prompt is longer."""


def bench(
    model: Annotated[str, typer.Argument(help="Dense or pruned: folder, hub id, .gguf file or smollm2-135m.")],
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="A second model, run in turns with the first.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the prompt (default: 512; with --layers 4096).")
    ] = None,
    kv_lengths: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Several prompts: a prefill of each length, and decoding after it."),
    ] = None,
    decode_tokens: Annotated[int, typer.Option(help="Tokens decoded one by one after the prompt.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    batch_sizes: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Several numbers of sequences at a time.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Measure each distinct decoder layer alone, and the dense one.")
    ] = False,
    repetitions: Annotated[
        int, typer.Option(help="Timed repetitions of each model, after one that is not counted.")
    ] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, or a torch device.")] = "auto",
    dtype: Annotated[str, typer.Option(help="To compute in: auto (as stored), float32, bfloat16 or float16.")] = "auto",
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Decode through torch.compile with a static cache (minutes to start)."),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code that comes with a model run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure speed and memory of saved models, each in a process of its own, or of their layers one by one."""
    lengths, sizes = _numbers("--kv-lengths", kv_lengths), _numbers("--batch-sizes", batch_sizes)

    from intraslice.speed.bench import BenchOptions, BenchResult, bench_models
    from intraslice.speed.layer_bench import PAPER_TOKENS, bench_layers

    if prompt_tokens is None:
        prompt_tokens = PAPER_TOKENS if layers else BenchOptions.prompt_tokens
    options = BenchOptions(
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        batch_size=batch_size,
        kv_lengths=lengths,
        batch_sizes=sizes,
        repetitions=repetitions,
        dtype=dtype,
        device=device,
        compile=compiled,
        trust_remote_code=trust_remote_code,
    )
    with ConsoleProgress() as progress:
        measure = bench_layers if layers else bench_models
        result = measure(model, against, options=options, progress=progress)
    if as_json:
        write_json(result.to_dict())
    elif isinstance(result, BenchResult):
        _print(result)
    else:
        _print_layers(result)


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= MAX_DIGITS for part in parts):
        raise RecipeError(
            f"{option} takes whole numbers separated by commas, for example 512,2048; got {str(text)[:80]!r}"
        )
    return tuple(map(int, parts))


_ROWS = (
    ("KV cache, bytes/token", "kv_cache_bytes_per_token", "{:,.0f}".format),
    ("parameters", "parameters", count),
    ("weight files", "weight_bytes", size),
    ("peak memory", "peak_memory_bytes", size),
)


def _spread(spread: Spread, factor: float = 1.0, digits: int = 1) -> str:
    return f"{factor * spread.median:,.{digits}f} +-{100 * spread.relative:.0f}%"


def _print(result: BenchResult) -> None:
    models = [result.model] if result.base is None else [result.model, result.base]
    compared = result.base is not None
    _print_speeds(result)
    rows: list[list[str]] = []
    for title, field, text in _ROWS:
        ratio = result.ratio.get(field)
        cells = [text(getattr(speed, field)) for speed in models]
        if compared:
            cells.append("" if ratio is None else f"{ratio:.3f}")
        rows.append([title, *cells])
    print_table("Sizes", ["", "model", "base", "ratio"] if compared else ["", "model"], rows)
    # Paths are longer than a column is wide.
    for title, speed in zip(("model", "base"), models, strict=False):
        print_line(f"{title:6}{speed.model}")
    _print_conditions(result.options, result.model.dtype, result.model.device)


def _print_speeds(result: BenchResult) -> None:
    columns = ["batch", "KV length", "prefill", "decode", "KV cache"]
    rows = [
        [
            str(point.batch_size),
            str(point.kv_length),
            _spread(point.prefill),
            _spread(point.decode),
            size(point.kv_cache_bytes),
        ]
        for point in result.model.points
    ]
    if result.base is not None:
        columns = ["batch", "KV length", "prefill", "base", "ratio", "decode", "base", "ratio", "KV cache"]
        rows = [
            [*row[:3], _spread(base.prefill), f"{ratio.prefill:.3f}", row[3], _spread(base.decode)]
            + [f"{ratio.decode:.3f}", row[4]]
            for row, base, ratio in zip(rows, result.base.points, result.point_ratios, strict=True)
        ]
    print_table("Speed, tokens/s", columns, rows)


def _print_conditions(options: BenchOptions, dtype: str, device: str) -> None:
    print_line(
        f"{options.decode_tokens} tokens decoded after each prompt, {dtype} on {device}"
        f"{', decoding compiled' if options.compile else ''}; medians of {options.repetitions} interleaved repetitions "
        "and half the interquartile range"
    )


def _print_layers(result: LayerBenchResult) -> None:
    models = [result.model] if result.base is None else [result.model, result.base]
    columns = ("layers", "heads", "kv", "dims", "FFN", "weights", "prefill, ms", "decode, ms", "KV bytes/token")
    rows = [row for speed in models for row in _layer_rows(speed)]
    ((batch_size, length),) = result.options.points
    print_table(f"One layer alone: {length} tokens, batch {batch_size}", columns, rows)
    sums = [
        [name, f"{1000 * speed.prefill_seconds:,.1f}", f"{1000 * speed.decode_seconds:,.2f}"]
        for name, speed in zip(("model", "base"), models, strict=False)
    ]
    if result.base is not None:
        sums.append(["times as fast", *(f"{result.speedup[name]:.3f}" for name in ("prefill", "decode"))])
    print_table("Sum over the layers, ms", ("", "prefill", "decode"), sums)
    for title, speed in zip(("model", "base"), models, strict=False):
        print_line(f"{title:6}{speed.model}{' (random weights)' if speed.random_weights else ''}")
    _print_conditions(result.options, result.dtype, result.device)


def _layer_rows(speed: LayersSpeed) -> list[list[str]]:
    return [
        [
            _ranges(entry.layers) if not speed.random_weights else "dense",
            str(entry.shape.num_attention_heads),
            str(entry.shape.num_key_value_heads),
            f"{entry.shape.qk_head_dim}/{entry.shape.v_head_dim}",
            str(entry.shape.intermediate_size),
            count(entry.parameters),
            _spread(entry.prefill_seconds, 1000),
            _spread(entry.decode_seconds, 1000, 3),
            f"{entry.kv_cache_bytes_per_token:,.0f}",
        ]
        for entry in speed.shapes
    ]


def _ranges(layers: tuple[int, ...]) -> str:
    """Return (0, 1, 2, 5) as "0-2,5"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1] = [parts[-1][0], layer]
        else:
            parts.append([layer])
    return ",".join("-".join(map(str, part)) for part in parts)
