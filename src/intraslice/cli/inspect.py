"""`intraslice inspect`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from intraslice.cli.console import layer_columns, layer_row, print_line, print_table, write_json
from intraslice.numbers import count, percent, size
from intraslice.results.sites import list_sites, site_errors

if TYPE_CHECKING:
    from intraslice.inspection import ModelInfo


def inspect(
    model: Annotated[str, typer.Argument(help="Dense or pruned: folder, hub id, .gguf file or smollm2-135m.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare every file with what was written; needs a checkpoint folder."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the shapes as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show the shape of each layer; without --verify no weights are read."""
    from intraslice.inspection import inspect_model, verify_model

    verified = verify_model(model) if verify else None
    info = inspect_model(model, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        write_json(info.to_dict() if verified is None else {**info.to_dict(), "verified": asdict(verified)})
        return
    _print(info)
    if verified is not None:
        print_line(f"verified            {count(len(verified.intact))} files are what was written")
        for name in verified.others:
            print_line(f"not of this run     {name}")


def _print(info: ModelInfo) -> None:
    sites = list_sites(info.layers)
    rows = [
        layer_row(layer.layer, layer.shape, layer.num_parameters, layer.kept, site_errors(layer), sites)
        for layer in info.layers
    ]
    how = f"pruned by {info.method}, sparsity {info.sparsity:.4f}" if info.method else "dense"
    family = f"{info.composite} with a text tower of {info.family}" if info.composite else info.family
    print_table(f"{info.model} ({family}, {how})", layer_columns(sites), rows)
    kept = info.layer_parameters / info.dense_layer_parameters
    print_line(f"parameters          {count(info.num_parameters)}")
    print_line(f"in decoder layers   {count(info.layer_parameters)} ({percent(kept)} of the dense model's)")
    ranks = [rank for layer in info.layers for _, rank in layer.shape.ranks]
    if ranks:
        print_line(f"two factors         {count(len(ranks))} weights, ranks {min(ranks)} to {max(ranks)}")
    if info.layers[0].shape.shortcuts:
        print_line(f"residual stream     {info.hidden_size} of {info.dense_hidden_size} channels, with its matrices")
    if info.weight_bytes:
        print_line(f"weights on disk     {size(info.weight_bytes)}")
    if info.code == "shipped":
        print_line(f"code in the folder  that of this release (sha256 {info.code_digest[:16]})")
    elif info.code == "other":
        print_line(
            f"code in the folder  NOT that of this release (sha256 {info.code_digest[:16] or 'unknown'}); it runs only "
            "with trust_remote_code, see SECURITY.md"
        )
