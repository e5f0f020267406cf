"""Which calibration text keeps most of a model.

    python benchmarks/calibration.py --data FOLDER --out out/calibration \\
        builtin self manual:0.5,code:0.5 FOLDER/wikitext2/train-1mb.txt

Prunes one model with each candidate (anything that `--calibration` takes) and measures perplexity on texts of several
domains, for the dense model as well. The log gap is ln(perplexity / dense perplexity). What is finished is kept in
--out: repeat the command to go on, or with more candidates. FOLDER holds wikitext2/test.txt (the test split of
WikiText-2 raw) and qa.txt (questions with right answers); the other texts come with Python:

    wiki     WikiText-2 test, windows 0-7
    qa       qa.txt, windows 0-5
    python   the topics of the Python language reference joined by blank lines, windows 4-9, which no source of
             `--calibration` but "builtin" contains
    asyncio  modules of the standard library that no source contains; no choice was made on this one

The mean is that of the first three.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from intraslice.api import prune
from intraslice.checkpoint.source import open_checkpoint
from intraslice.data.shipped import held_out_code
from intraslice.data.windows import token_stream
from intraslice.evaluation.perplexity import measure_perplexity
from intraslice.loading import load_model

SEQLEN = 2048
CHOSEN_ON = ("wiki", "qa", "python")


def texts(data: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yield name, text, first window and number of windows of each domain."""
    from pydoc_data.topics import topics

    yield "wiki", (data / "wikitext2" / "test.txt").read_text(encoding="utf-8"), 0, 8
    yield "qa", (data / "qa.txt").read_text(encoding="utf-8"), 0, 6
    yield "python", "\n\n".join(topics[name] for name in sorted(topics)), 4, 6
    yield "asyncio", held_out_code(), 0, 6


def evaluate(folder: str, data: Path, most: int | None, dtype: str) -> dict[str, float]:
    """Return the mean negative log likelihood of a token of each domain, in nats."""
    model, tokenizer = load_model(folder, dtype=dtype)
    found = {}
    for name, text, first, windows in texts(data):
        tokens = token_stream(text, tokenizer)[first * SEQLEN :]
        windows = windows if most is None else min(most, windows)
        found[name] = measure_perplexity(model, tokens, seqlen=SEQLEN, windows=windows).mean_nll
    return found


def run(candidate: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prune with a candidate and measure, unless the result is there."""
    pruning = {
        "method": args.method,
        "sparsity": args.sparsity,
        "num_samples": args.num_samples,
        "seqlen": args.seqlen,
        "seed": args.seed,
        "set": args.set,
    }
    settings = {
        "model": args.model,
        "calibration": candidate,
        # The dense model is the same whatever is pruned.
        **({} if candidate == "dense" else pruning),
        **({} if args.windows is None else {"windows": args.windows}),
        **({} if args.dtype == "auto" else {"dtype": args.dtype}),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    file = args.out / f"{key}.json"
    if file.is_file():
        return json.loads(file.read_text())
    started = time.monotonic()
    if candidate == "dense":
        folder, record = open_checkpoint(args.model).folder, {}
    else:
        folder = args.out / key
        options = {
            "calibration.num_samples": args.num_samples,
            "calibration.seqlen": args.seqlen,
            "calibration.seed": args.seed,
            **dict(one.split("=", 1) for one in args.set),
        }
        result = prune(
            args.model,
            output=folder,
            sparsity=args.sparsity,
            method=args.method,
            calibration=candidate,
            options=options,
            overwrite=True,
            resume=True,
        )
        record = {"calibration": result.calibration, "achieved": result.sparsity, "prune_seconds": result.seconds}
    nll = evaluate(str(folder), args.data, args.windows, args.dtype)
    found = {**settings, **record, "candidate": candidate, "nll": nll, "seconds": round(time.monotonic() - started, 1)}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(file)
    if candidate != "dense" and not args.keep:
        shutil.rmtree(folder)
    return found


def table(dense: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return perplexities with the log gap to the dense model, as markdown."""
    names = list(dense["nll"])
    lines = [f"| calibration | {' | '.join(names)} | mean of three | worst |", "| --- |" + " ---: |" * (len(names) + 2)]
    perplexities = [f"{math.exp(dense['nll'][name]):.2f}" for name in names]
    lines.append(f"| dense | {' | '.join(perplexities)} | | |")
    for row in rows:
        gaps = {name: row["nll"][name] - dense["nll"][name] for name in names}
        cells = [f"{math.exp(row['nll'][name]):.2f} ({gaps[name]:.3f})" for name in names]
        chosen = [gaps[name] for name in CHOSEN_ON]
        lines.append(
            f"| {row['candidate']} | {' | '.join(cells)} | {sum(chosen) / len(chosen):.3f} | {max(chosen):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure each candidate and print the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", nargs="+", metavar="CALIBRATION")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/calibration"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="intraslice")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="a further setting of the prune")
    parser.add_argument("--windows", type=int, help="measure at most this many windows of each text, for a quick look")
    parser.add_argument("--dtype", default="auto", help="to measure in; bfloat16 is faster on some processors")
    parser.add_argument("--keep", action="store_true", help="keep the pruned checkpoints")
    parser.add_argument("--threads", type=int, help="threads of torch")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    dense = run("dense", args)
    rows = []
    for candidate in args.candidates:
        rows.append(run(candidate, args))
        shown = table(dense, sorted(rows, key=lambda row: sum(row["nll"][name] for name in CHOSEN_ON)))
        (args.out / "table.md").write_text(shown + "\n")
        print(shown, flush=True)


if __name__ == "__main__":
    main()
