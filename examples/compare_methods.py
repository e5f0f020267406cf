"""Prune a model by two methods and compare them: compare_methods.py -o out/compared --methods intraslice flap.

For more than a glance use `intraslice compare`, which keeps what is done and writes a report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import intraslice


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune by each method, with the same calibration text and sparsity, and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="hub id, folder, .gguf file or built-in name")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the pruned models")
    parser.add_argument("--methods", nargs="+", default=["intraslice", "flap"], help="names of methods")
    parser.add_argument("--sparsity", type=float, default=0.3, help="fraction of the layers' weights to remove")
    parser.add_argument("--calibration", help="text that the model is shown, or several")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a sequence")
    args = parser.parse_args(arguments)

    size = {"calibration.num_samples": args.num_samples, "calibration.seqlen": args.seqlen}
    given = {"sparsity": args.sparsity, "calibration": args.calibration, "options": size}
    print(f"{'method':<12} {'sparsity':>8} {'perplexity':>10} {'seconds':>8}")
    for method in args.methods:
        folder = args.output / method
        result = intraslice.prune(args.model, output=folder, method=method, **given)
        measured = intraslice.evaluate(folder, seqlen=args.seqlen, windows=8)
        print(f"{method:<12} {result.sparsity:8.3f} {measured.perplexity:10.2f} {result.seconds['total']:8.1f}")


if __name__ == "__main__":
    main()
