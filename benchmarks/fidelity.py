"""Every method against its authors' code: the same model, calibration tokens, windows and size.

    python benchmarks/fidelity.py --data FOLDER slicegpt@0.3 flap@0.3 --keep-in benchmarks/fidelity.json

Prunes SmolLM2-135M with each METHOD@SPARSITY on 64 x 1024 tokens of WikiText-2 and measures perplexity on the first 8
windows of 2048 tokens of its test split. FOLDER holds wikitext2/train-1mb.txt (the first 1,000,000 bytes of the train
split) and wikitext2/test.txt. What the authors' code gave is in `AUTHORS`: it was run apart from this repository, with
the smallest patches that let it run on a CPU and with grouped queries.

A finished row is kept in --out; a row is measured again when the code of the package has changed. --keep-in adds the
rows to a file, from which tests/test_fidelity.py reads them. Without cells, the table of that file is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from intraslice.api import prune
from intraslice.comparison.code import code_digest
from intraslice.data.windows import token_stream
from intraslice.evaluation.perplexity import measure_perplexity
from intraslice.loading import load_model

MODEL, SEQLEN, WINDOWS = "smollm2-135m", 2048, 8
DENSE = 19.26

AUTHORS: dict[str, dict[float, tuple[float, float | None]]] = {
    "slicegpt": {0.2: (63.3, 0.195), 0.3: (91.9, 0.298), 0.4: (141.6, 0.399)},
    "flap": {0.2: (29.9, 0.200), 0.3: (52.6, 0.301), 0.4: (207.7, 0.399)},
    "wanda-sp": {0.2: (33.1, 0.199), 0.3: (53.6, 0.300)},
    "svd-llm": {0.2: (63.8, None), 0.3: (101.0, None), 0.4: (211.0, None)},
    "slimllm": {0.2: (39.4, 0.204), 0.3: (48.7, 0.294)},
}
"""Perplexity of the authors' code and the fraction of the layers' weights that it removed, where it was noted."""

BETTER: dict[str, str] = {
    "wanda-sp": "no kv head goes at 20 and 30 %; how the patched code splits the budget is not known exactly",
    "svd-llm": "each weight gets what rounding of the ranks before it has left over",
    "slimllm": "the swaps of heads go on until none raises the correlation, not through the heads once",
}
"""Why a method may be better than its authors' code by more than 5 %."""

NOT_MEASURED: tuple[tuple[str, float], ...] = (
    ("flap", 0.4),
    ("svd-llm", 0.4),
    ("slimllm", 0.2),
    ("slimllm", 0.3),
)
"""Rows of `AUTHORS` that have not been measured with the code as it is."""


def measure(cell: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prune and measure one METHOD@SPARSITY, unless the result is there."""
    method, _, asked = cell.partition("@")
    settings = {
        "method": method,
        "asked": float(asked),
        "options": dict(one.split("=", 1) for one in args.set),
        "num_samples": args.num_samples,
        "seqlen": args.seqlen,
        "seed": args.seed,
    }
    key = hashlib.sha256(json.dumps({**settings, "code": code_digest()}, sort_keys=True).encode()).hexdigest()[:16]
    file, folder = args.out / f"{key}.json", args.out / key
    if file.is_file():
        return json.loads(file.read_text())
    started = time.monotonic()
    result = prune(
        MODEL,
        output=folder,
        sparsity=settings["asked"],
        method=method,
        calibration=str(args.data / "wikitext2" / "train-1mb.txt"),
        options={
            "calibration.num_samples": args.num_samples,
            "calibration.seqlen": args.seqlen,
            "calibration.seed": args.seed,
            "run.matmul": "fast",
            **settings["options"],
        },
        overwrite=True,
        resume=True,
    )
    pruned_in = time.monotonic() - started
    model, tokenizer = load_model(str(folder))
    text = (args.data / "wikitext2" / "test.txt").read_text(encoding="utf-8")
    measured = measure_perplexity(model, token_stream(text, tokenizer), seqlen=SEQLEN, windows=WINDOWS)
    row = {
        **settings,
        "removed": round(result.sparsity, 4),
        "perplexity": round(math.exp(measured.mean_nll), 2),
        "prune_seconds": round(pruned_in),
    }
    file.write_text(json.dumps(row, indent=1) + "\n")
    shutil.rmtree(folder)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return ours beside the authors', as markdown."""
    lines = ["| method | asked | removed | ours | authors (removed) | ours / authors |", "| --- |" + " ---: |" * 5]
    for row in rows:
        options = "".join(f", {name}={value}" for name, value in row["options"].items())
        line = f"| `{row['method']}`{options} | {row['asked']:g} | {row['removed']:.3f} | {row['perplexity']:.1f} |"
        authors, removed = AUTHORS.get(row["method"], {}).get(row["asked"], (None, None))
        if authors is None:
            lines.append(f"{line} | |")
        else:
            shown = "" if removed is None else f" ({removed:.3f})"
            lines.append(f"{line} {authors:.1f}{shown} | {row['perplexity'] / authors:.2f} |")
    return "\n".join(lines)


def keep(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Put the rows in the file, in the place of those of the same settings, and return all of them."""
    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    names = ("method", "asked", "options", "num_samples", "seqlen", "seed")
    found = {json.dumps([row[name] for name in names], sort_keys=True): row for row in [*old, *rows]}
    kept = sorted(found.values(), key=lambda row: (row["method"], row["asked"], json.dumps(row["options"])))
    path.write_text(json.dumps({"dense": DENSE, "rows": kept}, indent=1) + "\n")
    return kept


def main() -> None:
    """Measure the cells one by one and print the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="METHOD@SPARSITY")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/fidelity"))
    parser.add_argument("--keep-in", type=Path, help="file that the rows are added to")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="a further setting of the prune")
    parser.add_argument("--threads", type=int, help="threads of torch")
    args = parser.parse_args()
    if args.cells and args.data is None:
        parser.error("--data is needed to measure a cell.")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = json.loads(args.keep_in.read_text())["rows"] if args.keep_in and args.keep_in.is_file() else []
    measured: list[dict[str, Any]] = []
    for cell in args.cells:
        measured.append(measure(cell, args))
        rows = measured if args.keep_in is None else keep(measured, args.keep_in)
        print(table(rows), flush=True)
    if not args.cells:
        print(table(rows))


if __name__ == "__main__":
    main()
