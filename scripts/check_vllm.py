"""Compare checkpoints in vLLM with the same checkpoints in transformers: check_vllm.py --native DIR [--stock DIR].

Routes: `native` trusts the code in the checkpoint, where neither intraslice nor its plug-in exists; `plug-in` trusts
nothing and gets a copy without `auto_map`; `stock` is a checkpoint of a stock class. Greedy tokens must be the same,
log-probabilities may differ by --bar. Then it shows what vLLM says to what cannot work.

Every model runs in a process of its own (this file with --worker), because vLLM keeps state and threads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

PROMPTS = (
    "The three largest cities in Europe are",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a small village by the sea, and in this village",
    "Water boils at a temperature of",
    "To make a good soup, first chop the onions. Then",
)
MAX_LENGTH = 512


@dataclass(frozen=True)
class Answer:
    """What a model said to the prompts.

    Attributes:
        greedy: new tokens of each prompt.
        chosen: their log-probabilities while generating.
        fed: log-probabilities of the tokens of a given text, each after those before it.
        top: the most likely tokens at each generated position.
        note: how the model was loaded.
    """

    greedy: list[list[int]]
    chosen: list[list[float]]
    fed: list[list[float]]
    top: list[list[dict[str, float]]]
    note: str


def run_transformers(job: dict[str, Any]) -> Answer:
    """Generate with transformers, and feed what was generated."""
    import torch
    from transformers import AutoModelForCausalLM

    # Eager: transformers before 5.24 leaves the cap of the scores of Gemma 2 out with its default.
    model: Any = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=job["trust_remote_code"],
    ).eval()
    greedy, chosen, fed, top = [], [], [], []
    with torch.no_grad():
        for prompt in job["prompts"]:
            out = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=job["num_tokens"],
                do_sample=False,
                eos_token_id=None,
                return_dict_in_generate=True,
                output_logits=True,
            )
            text = out.sequences[0]
            greedy.append(text[len(prompt) :].tolist())
            logprobs = torch.stack([step[0] for step in out.logits]).log_softmax(-1)
            chosen.append([float(row[token]) for row, token in zip(logprobs, greedy[-1], strict=True)])
            best = logprobs.topk(5)
            top.append(
                [
                    dict(zip(map(str, t.tolist()), v.tolist(), strict=True))
                    for v, t in zip(best.values, best.indices, strict=True)
                ]
            )
            all_logprobs = model(text[None]).logits[0].log_softmax(-1)
            fed.append(all_logprobs[:-1].gather(1, text[1:, None])[:, 0].tolist())
    return Answer(greedy, chosen, fed, top, type(model).__module__)


def run_vllm(job: dict[str, Any]) -> Answer:
    """Generate with vLLM, and feed what transformers generated."""
    from vllm import LLM, SamplingParams, __version__  # type: ignore[import-not-found]

    llm = LLM(
        job["model"],
        trust_remote_code=job["trust_remote_code"],
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=MAX_LENGTH,
        max_num_seqs=8,
        enforce_eager=job["eager"],
        enable_prefix_caching=False,
        kv_cache_memory_bytes=256 << 20,
        **job["engine"],
    )
    sampling: dict[str, Any] = {"temperature": 0.0, "detokenize": False, "ignore_eos": True}
    outs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        SamplingParams(max_tokens=job["num_tokens"], logprobs=5, **sampling),
        use_tqdm=False,
    )
    greedy = [list(out.outputs[0].token_ids) for out in outs]
    top = [
        [{str(token): entry.logprob for token, entry in step.items()} for step in out.outputs[0].logprobs]
        for out in outs
    ]
    chosen = [
        [step[str(token)] for step, token in zip(steps, tokens, strict=True)]
        for steps, tokens in zip(top, greedy, strict=True)
    ]
    outs = llm.generate(
        [{"prompt_token_ids": text} for text in job["texts"]],
        SamplingParams(max_tokens=1, prompt_logprobs=0, **sampling),
        use_tqdm=False,
    )
    fed = [
        [step[token].logprob for step, token in zip(out.prompt_logprobs[1:], text[1:], strict=True)]
        for out, text in zip(outs, job["texts"], strict=True)
    ]
    model = llm.llm_engine.model_executor.driver_worker.get_model()
    inner = getattr(model, "model", model)
    return Answer(
        greedy,
        chosen,
        fed,
        top,
        f"vLLM {__version__}, {type(model).__name__} of {type(inner).__module__.split('.')[0]}",
    )


def start(job: dict[str, Any], *, package: bool, plug_in: bool) -> tuple[Answer | None, str]:
    """Run a job in a process of its own; return its answer or None, and what it said."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        env = {
            **os.environ,
            # One process: it can be looked into, and its errors arrive here.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # Otherwise two workers on a machine with one NUMA node fail before they build a model.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(path / "modules"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if plug_in:
            env.pop("VLLM_PLUGINS", None)
        else:
            env["VLLM_PLUGINS"] = ""
        if not package:
            # In the way of the installed package, in every process that vLLM may start.
            (path / "intraslice.py").write_text("raise ModuleNotFoundError('no module intraslice', name='intraslice')")
            env["PYTHONPATH"] = str(path)
        (path / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, __file__, "--worker", folder],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        answer = path / "answer.json"
        said = done.stdout
        return (Answer(**json.loads(answer.read_text())) if answer.exists() else None), said


def work(folder: Path) -> None:
    """Do one job and write the answer."""
    job = json.loads((folder / "job.json").read_text())
    answer = run_transformers(job) if job["engine"] is None else run_vllm(job)
    (folder / "answer.json").write_text(json.dumps(vars(answer)))


def compare(route: str, expected: Answer, actual: Answer, bar: float) -> bool:
    """Print one line of the table, and how texts that part do so; return whether the route passes."""
    same = ties = 0
    gap = 0.0
    partings = []
    for i, (want, got) in enumerate(zip(expected.greedy, actual.greedy, strict=True)):
        agreed = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(want, got, strict=True))))
        differences = [abs(a - b) for a, b in zip(expected.chosen[i][:agreed], actual.chosen[i][:agreed], strict=True)]
        differences += [abs(a - b) for a, b in zip(expected.fed[i], actual.fed[i], strict=True)]
        # Of nan, max() would return whatever came first.
        gap = max([gap, *(float("inf") if math.isnan(difference) else difference for difference in differences)])
        if agreed == len(want):
            same += 1
            continue
        ours, theirs = str(want[agreed]), str(got[agreed])
        margin = expected.top[i][agreed][ours] - expected.top[i][agreed].get(theirs, float("-inf"))
        ties += margin < bar
        partings.append(
            f"    prompt {i}, new token {agreed}: {'near tie' if margin < bar else 'DIFFERENT'}; log-probabilities of "
            f"tokens {ours} and {theirs}: transformers {_two(expected, i, agreed, ours, theirs)}, "
            f"vLLM {_two(actual, i, agreed, ours, theirs)}"
        )
    passed = same + ties == len(expected.greedy) and gap < bar
    print(f"{route:8} {same:>4} of {len(expected.greedy)} {gap:>20.1e}  {'pass' if passed else 'FAIL'}  {actual.note}")
    for line in partings:
        print(line)
    return passed


def _two(answer: Answer, prompt: int, step: int, first: str, second: str) -> str:
    top = answer.top[prompt][step]
    return " and ".join(f"{top[token]:.4f}" if token in top else "less" for token in (first, second))


def without_auto_map(source: Path, target: Path) -> Path:
    """Copy a checkpoint without its code and without what points to it."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.py"))
    config = json.loads((target / "config.json").read_text())
    config.pop("auto_map", None)
    (target / "config.json").write_text(json.dumps(config))
    return target


def with_ragged_groups(source: Path, target: Path) -> Path | None:
    """Copy a checkpoint whose config says that the first kv head of a layer has a query head less than the others.

    Returns:
        The copy; None where no layer has two kv heads with two query heads each.
    """
    config = json.loads((source / "config.json").read_text())
    for index, layer in enumerate(config["intraslice"]["layers"]):
        groups = layer["heads_per_kv"]
        if len(groups) > 1 and groups[0] > 1:
            layer["heads_per_kv"] = [groups[0] - 1, *groups[1:]]
            values = config["per_layer_config"].setdefault(str(index), {})
            values["num_attention_heads"] = sum(layer["heads_per_kv"])
            values["num_key_value_heads"] = len(layer["heads_per_kv"])
            shutil.copytree(source, target)
            (target / "config.json").write_text(json.dumps(config))
            return target
    return None


def parts_of_heads(folder: Path) -> int:
    """Return the least number of devices that divides the query heads: others vLLM refuses by itself."""
    config = json.loads((folder / "config.json").read_text())
    heads = config.get("num_attention_heads") or config["n_head"]
    return next(parts for parts in range(2, heads + 1) if heads % parts == 0)


def reason(said: str) -> str:
    """Return the sentence of the guard, or the last line when it said something else."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    found = [re.search(r"vLLM (needs equally|cannot split).*?\.(?= |$)", line) for line in lines]
    ours = [match[0] for match in found if match]
    others = [line for line in lines if re.match(r"(Value error|\w*(Error|Exception)\b)", line)] or lines[-1:]
    return ours[-1] if ours else f"(no sentence of ours) {' '.join(others[-1:])}"


def main() -> None:
    """Run the routes and the guards."""
    parser = argparse.ArgumentParser(description=(__doc__ or " ").splitlines()[0])
    parser.add_argument("--native", type=Path, help="checkpoint of `intraslice prune --target vllm`")
    parser.add_argument("--stock", type=Path, help="checkpoint of `intraslice export --to stock`")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a prompt")
    parser.add_argument("--bar", type=float, default=1e-2, help="largest difference of log-probabilities")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model (minutes on a CPU)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return

    folders = [folder for folder in (options.native, options.stock) if folder]
    if not folders:
        parser.error("give --native or --stock")
    job: dict[str, Any] = {"num_tokens": options.tokens, "eager": not options.compile, "engine": None}
    passed = True
    with tempfile.TemporaryDirectory() as scratch:
        bare = ragged = None
        if options.native:
            bare = without_auto_map(options.native, Path(scratch) / "bare")
            ragged = with_ragged_groups(options.native, Path(scratch) / "ragged")
        routes = [
            ("native", options.native, options.native, True),
            ("plug-in", bare, options.native, False),
            ("stock", options.stock, options.stock, False),
        ]
        expected: dict[Path, Answer] = {}
        print(f"{'route':8} {'same tokens':>9} {'log-prob difference':>19}")
        for route, folder, reference, trust in routes:
            if folder is None:
                continue
            job |= {"prompts": tokenize(reference), "trust_remote_code": trust}
            if reference not in expected:
                answer, said = start({**job, "model": str(reference)}, package=False, plug_in=False)
                if answer is None:
                    sys.exit(f"transformers cannot run {reference}:\n{said[-3000:]}")
                expected[reference] = answer
            job["texts"] = [p + g for p, g in zip(job["prompts"], expected[reference].greedy, strict=True)]
            answer, said = start(
                {**job, "model": str(folder), "engine": {}}, package=route == "plug-in", plug_in=route == "plug-in"
            )
            if answer is None:
                passed = False
                print(f"{route:8} FAIL, vLLM stopped:\n{said[-6000:]}")
            else:
                passed &= compare(route, expected[reference], answer, options.bar)

        split = {"tensor_parallel_size": parts_of_heads(options.native)} if options.native else {}
        guards = [
            (f"native, {split}", options.native, True, split),
            (f"plug-in, {split}", bare, False, split),
            ("native, ragged groups", ragged, True, {}),
            ("plug-in, ragged groups", ragged, False, {}),
        ]
        for name, folder, trust, engine in guards:
            if folder is None:
                continue
            job |= {
                "model": str(folder),
                "trust_remote_code": trust,
                "engine": engine,
                "prompts": [[1]],
                "texts": [[1]],
            }
            answer, said = start(job, package=not trust, plug_in=not trust)
            sentence = "NOT REFUSED" if answer else reason(said)
            passed &= sentence.startswith("vLLM ")
            print(f"{name}: {sentence}", flush=True)
    sys.exit(not passed)


def tokenize(folder: Path) -> list[list[int]]:
    """Return the tokens of the prompts; a checkpoint without tokenizer gets numbers."""
    if not (folder / "tokenizer.json").exists():
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        return [[3 + (7 * i + 31 * j) % (vocabulary - 3) for j in range(9 + 5 * i)] for i in range(len(PROMPTS))]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


if __name__ == "__main__":
    main()
