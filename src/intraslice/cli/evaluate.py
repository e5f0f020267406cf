"""`intraslice eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from intraslice.cli.console import ConsoleProgress, LogJson, print_line, print_table, write_json
from intraslice.errors import RecipeError
from intraslice.evaluation.task_data import DEFAULT_BATCH_SIZE
from intraslice.evaluation.text_choice import is_plain

if TYPE_CHECKING:
    from intraslice.evaluation.domains import TextScore
    from intraslice.evaluation.tasks import TaskComparison, TaskResults

DEFAULT_TEXT = "builtin"
_OF_PERPLEXITY = ("text", "seqlen", "windows", "text_field")
_OF_TASKS = ("task_data", "limit", "batch_size")


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Dense or pruned: folder, hub id, .gguf file or smollm2-135m.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]TEXT[@FIRST-LAST]",
            help="builtin (default), wikitext2 (test split), or a .txt, .jsonl or .parquet file; NAME= is its name in "
            "the table, @4-9 measures only its windows 4 to 9. Repeatable.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="The dense model: adds the log gap, the KL divergence to it and the agreement of the most likely "
            "token; with --tasks, the difference with its paired standard error.",
        ),
    ] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens in a window; windows do not overlap.")] = 2048,
    windows: Annotated[
        int | None, typer.Option(help="Measure at most this many windows, from the start (default: all).")
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Column of a .jsonl or .parquet file that holds the text.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Measure zero-shot accuracy instead, through lm-eval: arc_easy, arc_challenge, piqa, winogrande, "
            "openbookqa, boolq, hellaswag (the paper's seven), or others of its tasks.",
        ),
    ] = None,
    task_data: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Read <task>.jsonl files, with the field names of the hub, from here."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use at most this many examples of each task, from the start (default: all).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples of a task at a time.")] = DEFAULT_BATCH_SIZE,
    device: Annotated[str, typer.Option(help="auto, cpu, or a torch device.")] = "auto",
    dtype: Annotated[str, typer.Option(help="To compute in: auto (as stored), float32, bfloat16 or float16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    log_json: LogJson = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure the perplexity of a saved model on one or more texts; with --tasks its zero-shot accuracy."""
    _refuse_options(context, _OF_PERPLEXITY if tasks is not None else _OF_TASKS, tasks is not None)
    shared: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    if tasks is not None:
        shared |= {"task_data": task_data, "limit": limit, "batch_size": batch_size}
        _tasks(model, tasks, against, as_json, log_json, **shared)
        return
    shared |= {"seqlen": seqlen, "windows": windows, "text_field": text_field}
    texts = text or [DEFAULT_TEXT]
    if against is None and len(texts) == 1 and is_plain(texts[0]):
        _perplexity(model, texts[0], as_json, log_json, **shared)
    else:
        _texts(model, texts, against, as_json, log_json, **shared)


def _refuse_options(context: typer.Context, names: tuple[str, ...], with_tasks: bool) -> None:
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise RecipeError(
                f"{option} belongs to the perplexity and cannot be used with --tasks; leave one of the two out."
                if with_tasks
                else f"{option} belongs to zero-shot tasks; name them with --tasks, or leave it out."
            )


def _perplexity(model: str, text: str, as_json: bool, log_json: bool, **options: Any) -> None:
    from intraslice import api

    with ConsoleProgress(log_json) as progress:
        result = api.evaluate(model, text=text, progress=progress, **options)
    if as_json:
        write_json({"model": model, "text": text, **result.to_dict()})
        return
    print_line(
        f"perplexity {result.perplexity:.4f} of {model} on {text} "
        f"({result.num_windows} windows of {result.seqlen} tokens, {result.num_tokens:,} predicted, "
        f"{result.seconds:.1f} s)"
    )


def _texts(model: str, texts: list[str], against: str | None, as_json: bool, log_json: bool, **options: Any) -> None:
    from intraslice import api

    with ConsoleProgress(log_json) as progress:
        scores = api.evaluate_texts(model, texts, against=against, progress=progress, **options)
    if as_json:
        write_json({"model": model, "against": against, **scores.to_dict()})
        return
    columns = ["text", "windows", "perplexity"]
    rows = [[score.name, _windows(score), f"{score.perplexity.perplexity:.4f}"] for score in scores.texts]
    if against is not None:
        columns += ["dense", "log gap", "KL, nats/token", "same token, %"]
        for row, score in zip(rows, scores.texts, strict=True):
            row += [_decimals(score.dense_perplexity), *_distances(score.gap, score.kl, score.agreement)]
        means = _distances(scores.mean_gap, scores.mean_kl, scores.mean_agreement)
        rows.append(["mean", "", "", "", *means])
    print_table("Perplexity" if against is None else f"Perplexity, and distance to {against}", columns, rows)
    print_line(f"{model}, windows of {options['seqlen']} tokens, {scores.seconds:.1f} s")


def _windows(score: TextScore) -> str:
    first, count = score.first_window, score.perplexity.num_windows
    return f"{first}-{first + count - 1}"


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _distances(gap: float | None, kl: float | None, agreement: float | None) -> list[str]:
    return [_decimals(gap), _decimals(kl), _share(agreement, None)]


def _tasks(model: str, tasks: str, against: str | None, as_json: bool, log_json: bool, **options: Any) -> None:
    from intraslice import api

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with ConsoleProgress(log_json) as progress:
        if against is None:
            found, results = None, api.evaluate_tasks(model, names, progress=progress, **options)
        else:
            found = api.compare_tasks(model, against, names, progress=progress, **options)
            results = found.model
    if as_json:
        shown = results.to_dict()
        write_json({"model": model, **shown} if found is None else {"model": model, "against": against, **_flat(found)})
        return
    _print_tasks(results)
    if found is not None:
        _print_differences(found, str(against))
    data = "the hub" if options["task_data"] is None else options["task_data"]
    print_line(
        f"{model}, 0-shot, data of {data}, lm-eval {results.lm_eval}, {results.seconds:.1f} s; "
        "averaged: acc_norm where a task has it, else acc"
    )


def _flat(found: TaskComparison) -> dict[str, Any]:
    differences = None if found.differences is None else found.differences.to_dict()
    return {**found.model.to_dict(), "dense": found.dense.to_dict(), "differences": differences}


def _print_differences(found: TaskComparison, against: str) -> None:
    if found.differences is None:
        print_line(f"the answers cannot be paired with those of {against}: they are not all right or wrong.")
        return
    pairs = [*found.differences.tasks.items(), ("average", found.differences.average)]
    dense = {name: score.reported for name, score in found.dense.tasks.items()} | {"average": found.dense.average}
    rows = [[name, _share(dense[name], None), _share(one.difference, one.stderr, sign="+")] for name, one in pairs]
    print_table("Against the dense model, points, with paired standard errors", ["task", "dense", "difference"], rows)


def _print_tasks(results: TaskResults) -> None:
    rows = [
        [
            name,
            _share(score.acc, score.acc_stderr),
            _share(score.acc_norm, score.acc_norm_stderr),
            _share(score.reported, None),
            f"{score.samples:,}",
        ]
        for name, score in results.tasks.items()
    ]
    rows.append(["average", "", "", _share(results.average, None), ""])
    print_table("Zero-shot accuracy, %", ["task", "acc", "acc_norm", "averaged", "examples"], rows)


def _share(value: float | None, error: float | None, sign: str = "-") -> str:
    if value is None:
        return ""
    text = f"{100 * value:{sign}.2f}"
    return text if error is None else f"{text} \u00b1 {100 * error:.2f}"
