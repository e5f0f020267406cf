"""Perplexity of the paper's recipe and of its Table 4 ablations on SmolLM2-135M at several sparsities.

    python benchmarks/quality.py --data FOLDER --out out/quality

FOLDER holds WikiText-2 raw: `train-1mb.txt` (the first 1,000,000 bytes of the train split, for calibration) and
`test.txt` (the whole test split). Protocol: calibration 64 x 1024 tokens, seed 0; perplexity on the first 8 windows
of 2048 tokens. Finished cells are kept in results.jsonl, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch

import intraslice
from intraslice.checkpoint.source import open_checkpoint

VARIANTS = {
    "naive": "whole heads, plain mask gradients (naive baseline)",
    "ada-h": "+ Ada-H",
    "intraslice": "+ Pca-A (`intraslice`, the default)",
    "iter-pca": "+ IPca (`iter-pca`)",
    "paper": "the paper's equations to the letter (`paper`)",
}


def measure(model: str, variant: str, sparsity: float, args: argparse.Namespace) -> dict[str, Any]:
    """Prune and evaluate one cell; the checkpoint is deleted unless --keep is given."""
    folder = args.out / f"{variant}-{round(100 * sparsity)}"
    options: dict[str, Any] = {
        "calibration.num_samples": args.num_samples,
        "calibration.seqlen": args.calibration_seqlen,
        "calibration.seed": args.seed,
        "run.scan_folder": str(args.out / "scans"),
    }
    options.update(pair.split("=", 1) for pair in args.set)
    started = time.monotonic()
    result = intraslice.prune(
        model,
        output=folder,
        sparsity=sparsity,
        method=variant,
        calibration=str(args.data / "train-1mb.txt"),
        options=options,
        overwrite=True,
    )
    seconds = time.monotonic() - started
    perplexity = evaluate(str(folder), args)
    if not args.keep:
        shutil.rmtree(folder)
    return {
        "variant": variant,
        "asked": sparsity,
        "sparsity": result.sparsity,
        "perplexity": perplexity,
        "layer_seconds": result.seconds["layers"],
        "seconds": seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "parameters": result.pruned_parameters,
    }


def evaluate(model: str, args: argparse.Namespace) -> float:
    """Return the perplexity on the first windows of test.txt."""
    text = str(args.data / "test.txt")
    return intraslice.evaluate(model, text=text, seqlen=args.seqlen, windows=args.windows).perplexity


def table(dense: float, cells: list[dict[str, Any]], sparsities: list[float]) -> str:
    """Return the results as a Markdown table, one row a variant."""
    lines = [
        "| variant | " + " | ".join(f"{100 * s:.0f} %" for s in sparsities) + " |",
        "| --- |" + " ---: |" * len(sparsities),
        "| dense | " + " | ".join([f"{dense:.2f}"] * len(sparsities)) + " |",
    ]
    found = {(cell["variant"], cell["asked"]): cell for cell in cells}
    for variant, label in VARIANTS.items():
        row = [found.get((variant, s)) for s in sparsities]
        if any(row):
            text = [f"{c['perplexity']:.2f} ({c['sparsity']:.3f})" if c else "" for c in row]
            lines.append(f"| {label} | " + " | ".join(text) + " |")
    return "\n".join(lines)


def main() -> None:
    """Fill the table, cell by cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train-1mb.txt and test.txt")
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.3, 0.2, 0.4, 0.5])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--calibration-seqlen", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="another setting of the recipe")
    parser.add_argument("--keep", action="store_true", help="keep the pruned checkpoints")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "results.jsonl"
    protocol = {
        name: getattr(args, name)
        for name in ("model", "num_samples", "calibration_seqlen", "seed", "seqlen", "windows", "set")
    }
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if any(row["protocol"] != protocol for row in rows):
        parser.error(f"{log} holds results of another protocol; choose another --out")
    open_checkpoint(args.model)  # fails early when the model is not there

    def keep(row: dict[str, Any]) -> None:
        rows.append({**row, "protocol": protocol})
        with log.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")

    for sparsity in args.sparsities:
        for variant in args.variants:
            if not any(row["variant"] == variant and row["asked"] == sparsity for row in rows):
                keep(measure(args.model, variant, sparsity, args))
                print(json.dumps(rows[-1]), flush=True)
    # Last, because the whole dense model in memory would count in the peak memory of the first prune.
    if not any(row["variant"] == "dense" for row in rows):
        keep({"variant": "dense", "asked": 0.0, "perplexity": evaluate(args.model, args)})
    dense = next(row["perplexity"] for row in rows if row["variant"] == "dense")
    print(f"\n{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(table(dense, rows, sorted({row["asked"] for row in rows if row["variant"] != "dense"})))


if __name__ == "__main__":
    main()
