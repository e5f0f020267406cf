"""`intraslice prune`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intraslice.cli.console import (
    ConsoleProgress,
    LogJson,
    interrupted,
    layer_columns,
    layer_row,
    print_line,
    print_table,
    write_json,
)
from intraslice.cli.heal import print_healing
from intraslice.data.mixture import CALIBRATION_HELP
from intraslice.methods.registry import METHODS
from intraslice.names import expanded
from intraslice.numbers import count, percent, size
from intraslice.results.sites import list_sites, site_errors

if TYPE_CHECKING:
    from intraslice.pruning import DryRun
    from intraslice.recipes.recipe import Recipe
    from intraslice.results.result import PruneResult


def prune(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, local folder, .gguf file, or the built-in name smollm2-135m."),
    ] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder to write.")] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(metavar="FLOAT", help="Share of the decoder layers' weights to remove, in [0, 0.95)."),
    ] = None,
    target_speedup: Annotated[
        str | None,
        typer.Option(
            metavar="FLOAT",
            help="Instead of --sparsity: how many times as fast as the dense model; layers are measured here.",
        ),
    ] = None,
    target_parameters: Annotated[
        str | None,
        typer.Option(metavar="COUNT", help="Instead of --sparsity: parameters of the result, at most; such as 6B."),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Instead of --sparsity: size of the weight files in the saved dtype, at most; such as 4GB.",
        ),
    ] = None,
    speedup_of: Annotated[
        str | None, typer.Option(metavar="decode|prefill", help="What is to be faster (default: decode).")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"intraslice (default), its variants, or another method to compare with: {', '.join(METHODS)}."
        ),
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(help="How much time the default method takes for quality: low, medium (default) or high."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH[:WEIGHT],...",
            help=CALIBRATION_HELP,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Where the model will run: transformers (default, free shapes), vllm, llama.cpp or stock."),
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(metavar="ffn=N,head=N", help="Multiples of FFN channels and head dimensions to keep."),
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Calibration sequences (default: 128).")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a sequence (default: 2048).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random (default: 0).")] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Column of a .jsonl or .parquet file that holds the text.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML file with any of the settings; flags win over it."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="One setting by its dotted name; wins over all. Repeatable."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="auto (default: an accelerator if there is one), cpu, or a torch device."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the saved weights: auto (default: as stored), float32, bfloat16 or float16."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code that comes with the input model run.")
    ] = False,
    heal: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS|TIME",
            help="Then heal: train to agree with the model on the same text, for 300k or 5M tokens, or 20min.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, estimated memory and all settings; write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last finished layer of an interrupted run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    log_json: LogJson = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Prune a model and write a smaller checkpoint that loads like any other."""
    from intraslice.healing.options import parse_budget
    from intraslice.recipes.recipe import load_recipe, parse_align

    flags = {
        "model": model,
        "output": output,
        "sparsity": sparsity,
        "target_speedup": target_speedup,
        "target_parameters": target_parameters,
        "target_size": target_size,
        "speedup_of": speedup_of,
        "method": method,
        "effort": effort,
        "target": target,
        **(parse_align(align) if align is not None else {}),
        "calibration.source": calibration,
        "calibration.num_samples": num_samples,
        "calibration.seqlen": seqlen,
        "calibration.seed": seed,
        "calibration.text_field": text_field,
        "run.device": device,
        "run.dtype": dtype,
        "revision": revision,
        # A flag that is not given must not undo what the recipe says.
        "trust_remote_code": trust_remote_code or None,
    }
    merged = load_recipe(recipe, flags, sets or [])
    if heal is not None:
        parse_budget(heal)
    if dry_run:
        _dry_run(merged, as_json, log_json)
        return
    try:
        result = _run(merged, heal, overwrite, resume, context.obj, log_json)
    except KeyboardInterrupt as error:
        advice = _advice(expanded(f"{merged.output}.partial"))
        raise typer.Exit(interrupted(error, advice, as_json=log_json)) from None
    if as_json:
        write_json(result.to_dict())
    else:
        print_result(result)


def _advice(work_folder: Path) -> str:
    if not work_folder.exists():
        return "nothing was written: repeat the command."
    return f"what is finished is in {work_folder}: repeat the command with --resume to go on."


def _run(
    recipe: Recipe, heal: str | None, overwrite: bool, resume: bool, arguments: Sequence[str], log_json: bool
) -> PruneResult:
    shared: dict[str, Any] = {"overwrite": overwrite, "resume": resume}
    shared["command"] = shlex.join(["intraslice", *arguments])
    with ConsoleProgress(log_json) as progress:
        if heal is None:
            from intraslice.pruning import prune_recipe

            return prune_recipe(recipe, progress=progress, **shared)
        from intraslice.healing.after_prune import prune_and_heal
        from intraslice.healing.options import heal_options

        options = heal_options(recipe.calibration, recipe.run.device, heal)
        return prune_and_heal(recipe, options, progress=progress, **shared)


def print_result(result: PruneResult) -> None:
    """Print the table of layers and the totals of a finished run."""
    dense_layer = result.dense_layer_parameters / len(result.layers)
    sites = list_sites(result.layers)
    rows = [
        layer_row(
            record.layer,
            record.shape,
            record.num_parameters,
            record.num_parameters / dense_layer,
            site_errors(record),
            sites,
        )
        for record in result.layers
    ]
    print_table("Layers (error: relative, squared, on the calibration tokens)", layer_columns(sites), rows)
    change = [
        ("parameters", count(result.dense_parameters), count(result.pruned_parameters)),
        ("in decoder layers", count(result.dense_layer_parameters), count(result.pruned_layer_parameters)),
        ("weights on disk", size(result.dense_bytes), size(result.pruned_bytes)),
    ]
    sizes = (
        (result.dense_parameters, result.pruned_parameters),
        (result.dense_layer_parameters, result.pruned_layer_parameters),
        (result.dense_bytes, result.pruned_bytes),
    )
    print_table(
        f"{result.model} -> {result.output}",
        ("", "dense", "pruned", "kept"),
        [(*row, percent(after / before)) for row, (before, after) in zip(change, sizes, strict=True)],
    )
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items() if name != "total")
    print_line(f"sparsity      {result.sparsity:.4f} (asked for {_asked(result)})")
    print_line(f"seconds       {result.seconds.get('total', 0):.1f} ({phases})")
    print_line(f"peak memory   {size(result.peak_memory_bytes)}")
    if result.healing is not None:
        print_healing(result.healing)
    print_line(f"checkpoint    {result.output}")


def _asked(result: PruneResult) -> str:
    if (parameters := result.recipe.get("target_parameters")) is not None:
        return f"{result.requested_sparsity:g}, for at most {count(parameters)} parameters"
    if (num_bytes := result.recipe.get("target_size")) is not None:
        return f"{result.requested_sparsity:g}, for at most {count(num_bytes)} bytes"
    speedup = result.recipe.get("target_speedup")
    if speedup is None:
        return f"{result.requested_sparsity:g}"
    return f"{result.requested_sparsity:g}, for {result.recipe['speedup_of']} {speedup:g} times as fast"


def _dry_run(recipe: Recipe, as_json: bool, log_json: bool) -> None:
    from intraslice.pruning import dry_run

    with ConsoleProgress(log_json) as progress:
        plan = dry_run(recipe, progress=progress)
    if as_json:
        write_json(
            {
                "dense": plan.dense.to_dict(),
                "target_parameters": plan.target_parameters,
                "target_layer_parameters": plan.target_layer_parameters,
                "estimated_peak_bytes": plan.estimated_peak_bytes,
                "gradient_chunks": plan.gradient_chunks,
                "one_chunk_bytes": plan.one_chunk_bytes,
                "recipe": plan.recipe.to_dict(),
            }
        )
        return
    _print_plan(plan)


def _print_plan(plan: DryRun) -> None:
    dense = plan.dense
    shape = dense.layers[0].shape
    print_line(f"model         {dense.model} ({dense.family}, {len(dense.layers)} layers)")
    print_line(
        f"a layer       {shape.num_attention_heads} heads, {shape.num_key_value_heads} kv heads, "
        f"head dim {shape.qk_head_dim}, FFN {shape.intermediate_size}, hidden {dense.hidden_size}"
    )
    print_table(
        "Sizes",
        ("", "dense", "target"),
        [
            ("parameters", count(dense.num_parameters), count(plan.target_parameters)),
            ("in decoder layers", count(dense.dense_layer_parameters), count(plan.target_layer_parameters)),
        ],
    )
    print_line(f"peak memory   about {size(plan.estimated_peak_bytes)}")
    if plan.gradient_chunks:
        more = f"; with --set run.boundary_bytes={plan.one_chunk_bytes} twice" if plan.gradient_chunks > 1 else ""
        print_line(f"gradient pass loads all layers {2 * plan.gradient_chunks} times{more}")
    print_line("recipe")
    for line in plan.recipe.to_yaml().splitlines():
        print_line(f"  {line}")
    print_line("dry run: nothing was written.")
