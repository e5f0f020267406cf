"""Prune a model, and measure what that costs in perplexity: prune_and_evaluate.py -o out/pruned."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import intraslice


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune, then measure the dense and the pruned model on the same text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="hub id, folder, .gguf file or built-in name")
    parser.add_argument("-o", "--output", required=True, help="folder of the pruned model")
    parser.add_argument("--sparsity", type=float, default=0.3, help="fraction of the layers' weights to remove")
    parser.add_argument("--calibration", help="text that the model is shown, or several")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--text", default="builtin", help="a text file that perplexity is measured on")
    args = parser.parse_args(arguments)

    result = intraslice.prune(
        args.model,
        output=args.output,
        sparsity=args.sparsity,
        calibration=args.calibration,
        options={"calibration.num_samples": args.num_samples, "calibration.seqlen": args.seqlen},
    )
    print(f"{result.dense_parameters:,} parameters -> {result.pruned_parameters:,}")
    for model in (args.model, args.output):
        measured = intraslice.evaluate(model, text=args.text, seqlen=args.seqlen, windows=8)
        print(f"{model}: perplexity {measured.perplexity:.2f}")


if __name__ == "__main__":
    main()
