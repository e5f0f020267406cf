"""Show what there is to compress in a dense model, layer by layer: analyze_spectra.py --model smollm2-135m.

Effective rank: how many principal components hold 99 % of the energy. A low rank beside a large width is room for PCA.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import intraslice


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure effective ranks and spectra; print the ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="hub id, folder, .gguf file or built-in name")
    parser.add_argument("--calibration", default="builtin", help="text that the model is shown, or several")
    parser.add_argument("--num-samples", type=int, default=8, help="sequences of text")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--json", type=Path, help="file for all that was measured, with the spectra")
    args = parser.parse_args(arguments)

    found = intraslice.analyze(args.model, text=args.calibration, num_samples=args.num_samples, seqlen=args.seqlen)
    widths = {"context": "head_dim", "act": "intermediate_size", "residual": "hidden_size"}
    print("layer " + " ".join(f"{name + ' of ' + str(found[width]):>18}" for name, width in widths.items()))
    for layer in range(len(found["act_spectrum"])):
        print(f"{layer:5} " + " ".join(f"{found['effective_rank'][name][layer]:18.1f}" for name in widths))
    if args.json is not None:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
