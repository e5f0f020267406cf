"""What a change of the method is worth on text that it has not seen: one row for docs/research.md.

    python benchmarks/research.py --text train-1mb.txt ffn.drift_share=0.5 attention.drift_share=0.5
    python benchmarks/research.py --text train-1mb.txt --layers 8:2 --num-samples 8 distill.sites=all

The first four fifths of the text calibrate, the last fifth judges, so that no choice is made on a test text. Without
--layers the whole model is pruned; what is printed is the log gap, ln(perplexity / dense perplexity), on windows of
2048 tokens. With --layers FIRST:COUNT only these layers are pruned, all of them by the same share, and nothing but them
is run: the error is that of the residual stream behind them, mean over the tokens of ||x - h||^2 / ||h||^2. That takes
half a minute of one core where a whole prune takes ten, and says little about allocation.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from intraslice.api import prune
from intraslice.checkpoint.source import open_checkpoint
from intraslice.data.windows import token_stream
from intraslice.evaluation.perplexity import measure_perplexity
from intraslice.layers.sites import ATTENTION, FFN
from intraslice.loading import load_model
from intraslice.methods.blockwise.allocators.base import Allocation, split_sparsity
from intraslice.methods.blockwise.budget import Budget
from intraslice.methods.blockwise.layer import LayerPlan, prune_layer
from intraslice.placement import Placement, matmul_precision
from intraslice.recipes.recipe import Recipe, load_recipe
from intraslice.streaming.hidden import HiddenStates, Streams, embedded_states
from intraslice.streaming.model import StreamedModel
from intraslice.streaming.propagate import propagate_layer

WINDOW = 2048
JUDGED = 4
"""Sequences that judge when only some layers are pruned."""


def halves(path: Path) -> tuple[str, str]:
    """Return the text that calibrates and the text that judges."""
    text = path.read_text(encoding="utf-8")
    cut = text.rindex("\n", 0, len(text) * 4 // 5)
    return text[:cut], text[cut:]


def perplexity_of(folder: str, text: str, windows: int) -> float:
    """Return the mean negative log likelihood of a token, in nats."""
    model, tokenizer = load_model(folder)
    return measure_perplexity(model, token_stream(text, tokenizer), seqlen=WINDOW, windows=windows).mean_nll


def whole_model(args: argparse.Namespace, work: Path) -> dict[str, float]:
    """Prune the model; return the log gap on the text that judges, and what it cost."""
    calibrates, judges = halves(args.text)
    text = work / "calibrates.txt"
    text.write_text(calibrates, encoding="utf-8")
    dense_file = args.keep / f"dense-{Path(args.model).name}-{args.text.stem}-{args.windows}.json"
    if dense_file.is_file():
        dense = float(dense_file.read_text())
    else:
        dense = perplexity_of(str(open_checkpoint(args.model).folder), judges, args.windows)
        dense_file.write_text(json.dumps(dense))
    options = {
        "calibration.num_samples": args.num_samples,
        "calibration.seqlen": args.seqlen,
        "run.matmul": "fast",
        "run.gradient_folder": str(args.keep),
        **dict(one.split("=", 1) for one in args.options),
    }
    out = work / "pruned"
    found = prune(
        args.model, output=out, sparsity=args.sparsity, method=args.method, calibration=str(text), options=options
    )
    nll = perplexity_of(str(out), judges, args.windows)
    return {
        "gap": nll - dense,
        "perplexity": math.exp(nll),
        "sparsity": found.sparsity,
        "plan_seconds": found.seconds["plan"],
        "layers_seconds": found.seconds["layers"],
    }


def _relative(pruned: HiddenStates, dense: HiddenStates) -> float:
    terms = []
    for part in pruned.slices():
        wanted = dense.read(part)
        terms.append(((pruned.read(part) - wanted).square().sum(-1) / wanted.square().sum(-1)).flatten())
    return float(torch.cat(terms).mean())


@torch.no_grad()
def some_layers(args: argparse.Namespace, recipe: Recipe) -> dict[str, float]:
    """Prune some layers; return the relative error of the stream behind them, on both texts."""
    first, count = (int(part) for part in args.layers.split(":"))
    checkpoint = open_checkpoint(args.model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)

    def blocks(text: str, number: int) -> Tensor:
        tokens = token_stream(text[: number * args.seqlen * 8], tokenizer).flatten()
        return tokens[: number * args.seqlen].view(number, args.seqlen)

    calibrates, judges = halves(args.text)
    model = StreamedModel(checkpoint, Placement.choose("cpu", "float32", torch.float32), (2, args.seqlen))
    texts = blocks(calibrates, args.num_samples), blocks(judges, JUDGED)
    (seen, seen_dense), (new, new_dense) = ([embedded_states(model, tokens, None) for _ in "pd"] for tokens in texts)
    for index in range(first):
        layer = model.load_layer(index)
        for states in (seen, seen_dense, new, new_dense):
            propagate_layer(layer, states)
    shares = split_sparsity(model.sites, args.sparsity, recipe.options.allocation)
    keep = {kind: [1.0 - share] * model.num_layers for kind, share in zip((ATTENTION, FFN), shares, strict=True)}
    budget = Budget(model.sites, Allocation.of_kinds(model.sites, keep), recipe.options)
    started = time.process_time()
    for index in range(first, first + count):
        layer = model.load_layer(index)
        streams = Streams(pruned=seen, dense=seen_dense)
        prune_layer(model, layer, index, streams, budget, LayerPlan(iter_pca=False), recipe.options)
        propagate_layer(layer, new)
        propagate_layer(model.load_layer(index), new_dense)
    spent = time.process_time() - started
    return {"new": _relative(new, new_dense), "seen": _relative(seen, seen_dense), "cpu_seconds": spent}


def main() -> None:
    """Measure, and print one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", metavar="A.B=C", help="settings of the prune")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--layers", metavar="FIRST:COUNT", help="prune these only")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="intraslice")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=5, help="of 2048 tokens, that judge a whole model")
    parser.add_argument("--keep", type=Path, default=Path("out/research"), help="folder of gradient passes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.keep.mkdir(parents=True, exist_ok=True)
    if args.layers:
        recipe = load_recipe(
            None, {"model": args.model, "method": args.method, "sparsity": args.sparsity}, args.options
        )
        with matmul_precision(fast=True):
            found = some_layers(args, recipe)
    else:
        with tempfile.TemporaryDirectory() as work:
            found = whole_model(args, Path(work))
    name = " ".join(args.options) or "as it is"
    print(f"| {name} | {' | '.join(f'{key} {value:.4g}' for key, value in found.items())} |", flush=True)


if __name__ == "__main__":
    main()
