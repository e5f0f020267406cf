"""Compare GGUF files of a pruned and a dense model, in float32 and quantised, with transformers and each other.

Without --dense only the first of these checks is made.

1. Greedy decoding of the pruned file, token by token with a float32 cache, gives the tokens of transformers, and logits
   that differ by less than --bar.
2. Quantised files of both models load and continue the same texts; Q8_0 mostly chooses the tokens of float32.
3. Decoding speed of both at the same quantisation, measured in turns, beside the ratio of their sizes. The pruned file
   must be the faster one.

Exit status 1 when one of these fails.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

import intraslice  # noqa: F401 - registers the classes of pruned checkpoints
from intraslice.runtime.configuration_intraslice import CACHE_ARGUMENT

PROMPTS = (
    "The three largest cities in Europe are",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a small village by the sea, and in this village",
    "Water boils at a temperature of",
    "To make a good soup, first chop the onions. Then",
)
CONTEXT = 512
# Q8_0 rounds weights to 8 bits; a wrong layout would agree on almost no token.
Q8_AGREEMENT = 0.9


def use_plain_kernels() -> None:
    """Load models without weights repacked for special kernels; llama_cpp.Llama has no argument for that."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def plain() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_cpp.llama_model_default_params = plain


def open_gguf(path: Path, threads: int, **options: Any) -> Any:
    """Load a file; the cache is float32 (0 is GGML_TYPE_F32) so that nothing but the weights is rounded."""
    return llama_cpp.Llama(
        model_path=str(path),
        n_ctx=CONTEXT,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        type_k=0,
        type_v=0,
        verbose=False,
        **options,
    )


@torch.inference_mode()
def transformers_greedy(model: Any, prompt: list[int], num_tokens: int) -> tuple[list[int], np.ndarray]:
    """Return the new tokens and the logits they were chosen from, without stopping at the end of the text."""
    tokens, logits, cache = [], [], None
    step = torch.tensor([prompt])
    for _ in range(num_tokens):
        answer = model(step, **{CACHE_ARGUMENT: cache}, use_cache=True)
        cache = answer[CACHE_ARGUMENT]
        logits.append(answer.logits[0, -1])
        tokens.append(int(logits[-1].argmax()))
        step = torch.tensor([tokens[-1:]])
    return tokens, torch.stack(logits).numpy()


def llama_greedy(model: Any, prompt: list[int], num_tokens: int) -> tuple[list[int], np.ndarray]:
    """Do the same with a llama.cpp model that keeps all logits."""
    model.reset()
    tokens, logits, step = [], [], prompt
    for _ in range(num_tokens):
        model.eval(step)
        logits.append(model.scores[model.n_tokens - 1].copy())
        tokens.append(int(logits[-1].argmax()))
        step = tokens[-1:]
    return tokens, np.stack(logits)


def llama_choices(model: Any, prompt: list[int], continuation: list[int]) -> list[int]:
    """Return what a llama.cpp model would choose at each place of a given continuation."""
    model.reset()
    model.eval(prompt + continuation[:-1])
    return model.scores[len(prompt) - 1 : model.n_tokens].argmax(-1).tolist()


def quantise(source: Path, kind: str, threads: int) -> Path:
    """Write a quantised file beside `source`."""
    target = source.with_name(f"{source.name.removesuffix('-f32.gguf')}-{kind}.gguf")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = threads
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if status != 0:
        sys.exit(f"error: llama.cpp cannot quantise {source} to {kind} (status {status})")
    return target


def weight_bytes(path: Path) -> int:
    """Return the bytes of all tensors: what decoding a token reads, but for the rows of an untied embedding."""
    return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)


def decode_speed(model: Any, prompt: list[int], num_tokens: int) -> float:
    """Return decoded tokens a second."""
    model.reset()
    model.eval(prompt)
    begin = time.perf_counter()
    for _ in range(num_tokens):
        model.eval(prompt[:1])
    # Reading the logits waits for the last token.
    model._ctx.get_logits()
    return num_tokens / (time.perf_counter() - begin)


def compare_greedy(args: argparse.Namespace, prompts: list[list[int]], tokenizer: Any) -> tuple[list[list[int]], bool]:
    """Print check 1; return the continuations of transformers and whether it passed."""
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    llama = open_gguf(args.pruned, args.threads, logits_all=True)
    continuations, passed, largest, scale = [], True, 0.0, 0.0
    for text, prompt in zip(PROMPTS, prompts, strict=True):
        expected, wanted = transformers_greedy(model, prompt, args.tokens)
        found, logits = llama_greedy(llama, prompt, args.tokens)
        same = next((i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]), args.tokens)
        # Up to and with the first other token, both have read the same.
        difference = float(np.abs(logits - wanted)[: same + 1].max())
        print(f"{same:4d} of {args.tokens} tokens the same, logits differ by {difference:.2e}: {text!r}")
        largest, scale = max(largest, difference), max(scale, float(np.abs(wanted).max()))
        passed &= same == args.tokens
        continuations.append(expected)
    compare_tokenizers(llama, tokenizer)
    llama.close()
    print(f"largest difference {largest:.2e} on a scale of {scale:.0f}, allowed {args.bar:.0e}")
    return continuations, passed and largest < args.bar


def compare_tokenizers(llama: Any, tokenizer: Any) -> None:
    """Print how many texts both tokenizers cut alike; transformers' reading of a GGUF tokenizer is not exact."""
    texts = [*PROMPTS, "In 2024, 1 234.5 km²  were\n\n\tmeasured: 37 %"]
    same = sum(
        llama.tokenize(text.encode(), add_bos=False) == tokenizer(text, add_special_tokens=False).input_ids
        for text in texts
    )
    print(f"the tokenizers of the file and of the checkpoint agree on {same} of {len(texts)} texts")


def compare_quantised(
    args: argparse.Namespace, kind: str, prompts: list[list[int]], continuations: list[list[int]], tokenizer: Any
) -> bool:
    """Print checks 2 and 3 for one kind of quantisation; return whether they passed."""
    paths = {"pruned": quantise(args.pruned, kind, args.threads), "dense": quantise(args.dense, kind, args.threads)}
    llama = open_gguf(paths["pruned"], args.threads, logits_all=True)
    agree = [
        chosen == wanted
        for prompt, continuation in zip(prompts, continuations, strict=True)
        for chosen, wanted in zip(llama_choices(llama, prompt, continuation), continuation, strict=True)
    ]
    text = tokenizer.decode(llama_greedy(llama, prompts[0], 24)[0])
    llama.close()
    agreement = sum(agree) / len(agree)
    print(f"{kind}: chooses {agreement:.1%} of the float32 tokens; {PROMPTS[0]!r} -> {text!r}")

    models = {name: open_gguf(path, args.threads) for name, path in paths.items()}
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        decode_speed(model, prompts[0], 8)
    for _ in range(args.repetitions):
        for name, model in models.items():
            speeds[name].append(decode_speed(model, prompts[0], args.tokens))
    for model in models.values():
        model.close()
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    for name, found in speeds.items():
        print(f"  {name:6} {medians[name]:7.1f} tokens/s (from {min(found):.1f} to {max(found):.1f})")
    speedup = medians["pruned"] / medians["dense"]
    files = paths["dense"].stat().st_size / paths["pruned"].stat().st_size
    weights = weight_bytes(paths["dense"]) / weight_bytes(paths["pruned"])
    print(f"  pruned / dense speed {speedup:.3f}; dense / pruned file bytes {files:.3f}, weight bytes {weights:.3f}")
    return speedup > 1.0 and (kind != "Q8_0" or agreement >= Q8_AGREEMENT)


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the pruned checkpoint folder")
    parser.add_argument("--pruned", type=Path, required=True, help="its GGUF file in float32")
    parser.add_argument("--dense", type=Path, help="GGUF file of the dense model in float32")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each prompt (default %(default)s)")
    parser.add_argument("--bar", type=float, default=1e-2, help="allowed logit difference (default %(default)s)")
    parser.add_argument("--quantisations", default="Q8_0,Q4_0", help="such as Q8_0,Q4_K_M (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=7, help="of each speed (default %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all (%(default)s)")
    parser.add_argument("--plain-kernels", action="store_true", help="no repacked weights: where AMX kernels trap")
    args = parser.parse_args()
    if args.plain_kernels:
        use_plain_kernels()
    torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    failed = []
    continuations, passed = compare_greedy(args, prompts, tokenizer)
    if not passed:
        failed.append("greedy tokens or logits in float32")
    for kind in args.quantisations.split(",") if args.dense else ():
        if not compare_quantised(args, kind, prompts, continuations, tokenizer):
            failed.append(f"{kind} (agreement or speed)")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    print("all checks passed")


if __name__ == "__main__":
    main()
