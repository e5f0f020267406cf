"""What pruning costs, and what the pruned model gains.

    python benchmarks/speed.py --data FOLDER --out out/speed

Pruning time as a multiple of one plain forward pass over the same calibration tokens with the stock class, in the
same run (before and after, the mean of both); peak memory of the prune, in a process of its own; prefill and decode
of the saved model against the dense one, interleaved, medians, decoding as it is and through torch.compile. FOLDER
holds train-1mb.txt, the first 1,000,000 bytes of the train split of WikiText-2 raw.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from intraslice.api import benchmark
from intraslice.checkpoint.source import open_checkpoint
from intraslice.data.calibration import load_calibration
from intraslice.progress import SilentProgress
from intraslice.results.result import PruneResult
from intraslice.speed.bench import BenchOptions


@torch.inference_mode()
def forward_seconds(folder: Path, tokens: torch.Tensor, batch: int) -> float:
    """Return the seconds of one forward pass over all tokens, logits included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model(tokens[:1])  # the first call allocates
    started = time.monotonic()
    for part in tokens.split(batch):
        model(part)
    return time.monotonic() - started


def main() -> None:
    """Measure, print one JSON object and a short text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/speed"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--method", default="intraslice")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--calibration-seqlen", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(args.model)
    text = str(args.data / "train-1mb.txt")
    tokens = load_calibration(
        text,
        AutoTokenizer.from_pretrained(checkpoint.folder),
        num_samples=args.num_samples,
        seqlen=args.calibration_seqlen,
        seed=0,
        vocab_size=checkpoint.config.vocab_size,
        model_folder=checkpoint.folder,
        progress=SilentProgress(),
    ).tokens
    pruned = args.out / "pruned"
    before = forward_seconds(checkpoint.folder, tokens, 2)
    command = [sys.executable, "-m", "intraslice", "prune", args.model, "-o", str(pruned)]
    command += [
        "--sparsity",
        str(args.sparsity),
        "--method",
        args.method,
        "--calibration",
        text,
        "--overwrite",
    ]
    command += ["--num-samples", str(args.num_samples), "--seqlen", str(args.calibration_seqlen)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = forward_seconds(checkpoint.folder, tokens, 2)
    result = PruneResult.load(pruned)
    forward = (before + after) / 2
    bench, compiled = (
        benchmark(pruned, args.model, options=BenchOptions(repetitions=args.repetitions, compile=compile))
        for compile in (False, True)
    )
    dense_flops = checkpoint.num_parameters()
    report = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "forward_seconds": [round(before, 2), round(after, 2)],
        "prune_seconds": result.seconds,
        "prune_in_forward_passes": round(result.seconds["total"] / forward, 2),
        "prune_peak_memory_bytes": result.peak_memory_bytes,
        "sparsity": result.sparsity,
        # Two operations a weight and token; attention scores and norms are left out.
        "flop_ratio": round(dense_flops / result.pruned_parameters, 3),
        "bench": bench.to_dict(),
        "bench_compiled": compiled.to_dict(),
    }
    (args.out / "speed.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
