"""`intraslice bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from intraslice.cli.console import ConsoleProgress, count, print_line, print_table, size, write_json

if TYPE_CHECKING:
    from intraslice.evaluation.bench import BenchResult


def bench(
    model: Annotated[str, typer.Argument(help="Dense or pruned: folder, hub id, .gguf file or smollm2-135m.")],
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="A second model, run in turns with the first.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    decode_tokens: Annotated[int, typer.Option(help="Tokens decoded one by one after it.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
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
    """Measure speed and memory of saved models, each in a process of its own."""
    from intraslice.evaluation.bench import BenchOptions, bench_models

    options = BenchOptions(
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        batch_size=batch_size,
        repetitions=repetitions,
        dtype=dtype,
        device=device,
        compile=compiled,
        trust_remote_code=trust_remote_code,
    )
    with ConsoleProgress() as progress:
        result = bench_models(model, against, options=options, progress=progress)
    if as_json:
        write_json(result.to_dict())
    else:
        _print(result)


_ROWS = (
    ("prefill, tokens/s", "prefill_tokens_per_second", "{:,.1f}".format),
    ("decode, tokens/s", "decode_tokens_per_second", "{:,.1f}".format),
    ("KV cache, bytes/token", "kv_cache_bytes_per_token", "{:,.0f}".format),
    ("parameters", "parameters", count),
    ("weight files", "weight_bytes", size),
    ("peak memory", "peak_memory_bytes", size),
)


def _print(result: BenchResult) -> None:
    models = [result.model] if result.base is None else [result.model, result.base]
    compared = result.base is not None
    columns = ["", "model", "base", "ratio"] if compared else ["", "model"]
    rows: list[list[str]] = []
    for title, field, text in _ROWS:
        ratio = result.ratio.get(field)
        cells = [text(getattr(speed, field)) for speed in models]
        if compared:
            cells.append("" if ratio is None else f"{ratio:.3f}")
        rows.append([title, *cells])
    print_table("Saved models", columns, rows)
    # Paths are longer than a column is wide.
    for title, speed in zip(("model", "base"), models, strict=False):
        print_line(f"{title:6}{speed.model}")
    options = result.options
    print_line(
        f"prompt {options.prompt_tokens}, decoded {options.decode_tokens}, batch {options.batch_size}, "
        f"{result.model.dtype} on {result.model.device}{', decoding compiled' if options.compile else ''}; "
        f"medians of {options.repetitions} interleaved repetitions"
    )
