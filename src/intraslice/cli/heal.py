"""`intraslice heal`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intraslice.cli.console import (
    ConsoleProgress,
    LogJson,
    interrupted,
    print_line,
    print_table,
    write_json,
)
from intraslice.names import expanded
from intraslice.numbers import count, duration, number, size

if TYPE_CHECKING:
    from intraslice.healing.run import HealResult
    from intraslice.results.healing import HealingRecord


def heal(
    context: typer.Context,
    checkpoint: Annotated[
        str, typer.Argument(help="Folder that 'intraslice prune' has written, or a stock export of it.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    budget: Annotated[
        str, typer.Option(metavar="TOKENS|TIME", help="How long: 300k, 5M or 1G tokens, or 20min or 2h.")
    ] = "1M",
    teacher: Annotated[
        str | None, typer.Option(help="The dense model (default: the one that the checkpoint was pruned from).")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH[:WEIGHT],...",
            help="Text to learn from, as for prune (default: the one it was pruned on).",
        ),
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Column of a .jsonl or .parquet file that holds the text.")
    ] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences in one step.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Forward passes that a step is cut into, to save memory.")] = 1,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate (default: 2e-4 for full, 5e-4 for lora).")
    ] = None,
    weights: Annotated[
        str, typer.Option(metavar="full|lora", help="Train the weights, or low-rank additions that are merged.")
    ] = "full",
    rank: Annotated[int, typer.Option(help="Of the additions of lora.")] = 16,
    train_embeddings: Annotated[
        bool, typer.Option("--train-embeddings", help="With full: train embeddings and output head too.")
    ] = False,
    hidden_weight: Annotated[float, typer.Option(help="Weight of the error of each layer's output.")] = 0.0,
    task_weight: Annotated[float, typer.Option(help="Weight of the loss of the next token.")] = 0.0,
    held_out: Annotated[int, typer.Option(help="Sequences that judge and are not trained on.")] = 16,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between two measurements on them (default: 25, or a twentieth).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, or a torch device.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="Of products: auto (bfloat16 on an accelerator), float32 or bfloat16.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the saved weights: auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a teacher on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code that comes with the teacher's tokenizer run.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted healing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    log_json: LogJson = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train a pruned checkpoint to agree with its dense model; sizes and shapes stay as they are."""
    from intraslice.healing.options import HealOptions

    options = HealOptions(
        budget=budget,
        calibration=calibration,
        text_field=text_field,
        seqlen=seqlen,
        batch_size=batch_size,
        accumulate=accumulate,
        lr=lr,
        weights=weights,  # type: ignore[arg-type]
        rank=rank,
        train_embeddings=train_embeddings,
        hidden_weight=hidden_weight,
        task_weight=task_weight,
        held_out=held_out,
        evaluate_every=evaluate_every,
        seed=seed,
        device=device,
        precision=precision,  # type: ignore[arg-type]
        dtype=dtype,
    )
    settings: dict[str, Any] = {
        "teacher": teacher,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "overwrite": overwrite,
        "resume": resume,
        "command": shlex.join(["intraslice", *context.obj]),
    }
    output = expanded(output)
    try:
        result = _run(checkpoint, output, options, settings, log_json)
    except KeyboardInterrupt as error:
        work = output.with_name(output.name + ".partial")
        kept = f"the last measured state is in {work}: repeat the command with --resume to go on."
        advice = kept if work.exists() else "nothing was written: repeat the command."
        raise typer.Exit(interrupted(error, advice, as_json=log_json)) from None
    if as_json:
        write_json(result.to_dict())
    else:
        print_healing(result.record)
        print_line(f"checkpoint    {result.output}")


def _run(checkpoint: str, output: Path, options: Any, settings: dict[str, Any], log_json: bool) -> HealResult:
    from intraslice.healing.run import heal_checkpoint

    with ConsoleProgress(log_json) as progress:
        return heal_checkpoint(checkpoint, output, options, progress=progress, **settings)


def print_healing(record: HealingRecord) -> None:
    """Print the curve and the totals of a finished healing."""
    rows = [
        (
            str(point.step),
            count(point.tokens),
            number(point.loss, 4),
            f"{point.kl:.4f}" + (" *" if point.step == record.best_step else ""),
            duration(point.seconds),
        )
        for point in record.curve
    ]
    print_table("Healing (* the weights that were kept)", ("step", "tokens", "loss", "held-out KL", "time"), rows)
    if record.stopped is not None:
        print_line(f"stopped       {record.stopped}")
    print_line(f"held-out KL   {record.kl_before:.4f} -> {record.best.kl:.4f} nats per token")
    print_line(f"speed         {count(record.tokens_per_second)} tokens/s")
    print_line(f"peak memory   {size(record.peak_memory_bytes)}")
