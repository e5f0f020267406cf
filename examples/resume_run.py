"""Prune a model in a run that may be stopped at any time: resume_run.py -o out/pruned.

Stop it with Ctrl-C and start it again with the same arguments: it goes on behind the last finished layer, and the
result is the same as without the interruption.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import intraslice


def main(arguments: Sequence[str] | None = None) -> None:
    """Begin a run, or finish the one that was interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="hub id, folder, .gguf file or built-in name")
    parser.add_argument("-o", "--output", required=True, help="folder of the pruned model")
    parser.add_argument("--sparsity", type=float, default=0.3, help="fraction of the layers' weights to remove")
    parser.add_argument("--calibration", help="text that the model is shown, or several")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a sequence")
    args = parser.parse_args(arguments)

    size = {"calibration.num_samples": args.num_samples, "calibration.seqlen": args.seqlen}
    given = {"sparsity": args.sparsity, "calibration": args.calibration, "options": size}
    try:
        # With nothing to continue, `resume` begins at the first layer. Other options than before are refused.
        result = intraslice.prune(args.model, output=args.output, resume=True, **given)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
    print(f"{result.output}: {len(result.layers)} layers, {result.pruned_parameters:,} parameters")


if __name__ == "__main__":
    main()
