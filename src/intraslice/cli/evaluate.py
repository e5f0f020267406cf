"""`intraslice eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from intraslice.cli.console import ConsoleProgress, print_line, write_json


def evaluate(
    model: Annotated[str, typer.Argument(help="Dense or pruned: folder, hub id, .gguf file or smollm2-135m.")],
    text: Annotated[
        str,
        typer.Option(metavar="NAME|PATH", help="builtin, wikitext2 (test split), or a .txt, .jsonl or .parquet file."),
    ] = "builtin",
    seqlen: Annotated[int, typer.Option(help="Tokens in a window; windows do not overlap.")] = 2048,
    windows: Annotated[
        int | None, typer.Option(help="Measure at most so many windows, from the start (default: all).")
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Column of a .jsonl or .parquet file that holds the text.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, or a torch device.")] = "auto",
    dtype: Annotated[str, typer.Option(help="To compute in: auto (as stored), float32, bfloat16 or float16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure the perplexity of a saved model, dense or pruned."""
    from intraslice import api

    with ConsoleProgress() as progress:
        result = api.evaluate(
            model,
            text=text,
            seqlen=seqlen,
            windows=windows,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            text_field=text_field,
            progress=progress,
        )
    if as_json:
        write_json({"model": model, "text": text, **result.to_dict()})
        return
    print_line(
        f"perplexity {result.perplexity:.4f} of {model} on {text} "
        f"({result.num_windows} windows of {result.seqlen} tokens, {result.num_tokens:,} predicted, "
        f"{result.seconds:.1f} s)"
    )
