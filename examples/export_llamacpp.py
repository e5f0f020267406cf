"""Prune a model to shapes that llama.cpp runs, and write a GGUF file: export_llamacpp.py -o out/for-llama.

Needs the extra [gguf]. Quantise the file as any other, with llama.cpp's own tool.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import intraslice


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune for llama.cpp, then export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="hub id, folder, .gguf file or built-in name")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the pruned model and the file")
    parser.add_argument("--sparsity", type=float, default=0.3, help="fraction of the layers' weights to remove")
    parser.add_argument("--calibration", help="text that the model is shown, or several")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a sequence")
    args = parser.parse_args(arguments)

    checkpoint = args.output / "checkpoint"
    size = {"calibration.num_samples": args.num_samples, "calibration.seqlen": args.seqlen}
    given = {"sparsity": args.sparsity, "calibration": args.calibration, "options": size}
    # Without a target, layers may get shapes that llama.cpp takes only with padding.
    intraslice.prune(args.model, output=checkpoint, target="llama.cpp", **given)
    report = intraslice.export(checkpoint, to="gguf", output=args.output / "model.gguf")
    print(f"{report.output} is written")
    for note in report.notes:
        print(f"  {note}")


if __name__ == "__main__":
    main()
