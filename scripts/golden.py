"""Prove that a refactor moved no number: prune tiny models with two checkouts and compare the weights bit by bit.

    python scripts/golden.py BEFORE AFTER [--methods intraslice,flap] [--families llama,opt] [--jobs 2]

BEFORE and AFTER are checkouts of this repository. Both prune the same seeded models by the same calls of
intraslice.prune, on one CPU thread each. No result is stored: numbers hold for one machine and one set of libraries.
Options have the names of before the refactor, and a method gets only those that it reads. The exit status is 1 when a
case differs: in a weight, in the shapes of config.json, or in the class of the error that it ends in.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

METHODS = (
    *("intraslice", "iter-pca", "ada-h", "naive", "wanda-sp", "flap"),
    *("slimllm", "transact", "sobp", "paper", "svd-llm", "slicegpt"),
    *("modegpt", "llm-pruner", "llm-surgeon", "disp-llm", "tyr"),
)
WHOLE_MODEL = ("svd-llm", "slicegpt")  # these read no option of attention or FFN
NARROWING = ("intraslice", "iter-pca", "ada-h", "paper", "transact", "modegpt", "disp-llm")  # these make heads narrower
SEQLEN = 48

COMMON: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
}
GATED: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GATED),
    "llama-mha": ("llama", {**GATED, "num_key_value_heads": 8, "head_dim": 8}),
    "mistral": ("mistral", {**GATED, "sliding_window": 16}),
    "qwen2": ("qwen2", {**GATED, "tie_word_embeddings": True}),
    "phi3": ("phi3", {**GATED, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64}),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64, "tie_word_embeddings": True}),
    "opt-350m": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64, "do_layer_norm_before": False}),
}
"""Type of the model and fields of its config, by the name that --families takes."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

RUN = {"run.device": "cpu", "run.batch_tokens": 2 * SEQLEN}  # two batches: sums over batches count as well
TARGETS: dict[str, dict[str, Any]] = {
    "vllm": {"attention.head_multiple": 2, "ffn.ffn_multiple": 4},
    "llama.cpp": {"attention.head_multiple": 2, "attention.context_multiple": 4, "ffn.ffn_multiple": 4},
    "stock": {"attention.head_multiple": 2, "ffn.ffn_multiple": 1},
}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "intraslice": (
        {"run.dtype": "bfloat16"},
        {"run.hidden_states": "disk"},
        {"run.boundary_bytes": 1},  # as many gradient chunks as batches
        {"run.batch_tokens": 2048},
        {"run.matmul": "fast"},
        {"attention.target": "block"},
        {"attention.groups": "uniform"},
        {"attention.shrink_to": "zero"},
        {"attention.adaptive_heads": False, "attention.head_multiple": None},  # whole heads have no width to round
        {"attention.min_head_fraction": 0.25},
        {"ffn.shrink_to": "zero"},
        {"ffn.target": "block"},
        {"ffn.iter_pca": True, "ffn.iter_pca_fraction": 1.0},
        {"allocation.name": "uniform"},
        {"allocation.ffn_bias": 0.9},
        {"allocation.max_block_sparsity": 0.35},
        {"allocation.num_ffn_blocks": 4},
        {"sparsity": 0.6},
    ),
    "sobp": ({"run.boundary_bytes": 1}, {"sparsity": 0.6}),
    "flap": ({"run.hidden_states": "disk"}, {"sparsity": 0.6}),
    "slimllm": ({"sparsity": 0.6},),
    "transact": ({"sparsity": 0.6},),
    "svd-llm": ({"run.dtype": "bfloat16"}, {"run.hidden_states": "disk"}),
    "slicegpt": ({"run.dtype": "bfloat16"}, {"run.hidden_states": "disk"}),
}
"""Further calls, for the models stored in float32: what they change; None leaves an option of the method out."""

# What a broken checkout may end a case in; anything else ends its process.
CRASHES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(OSError, RuntimeError, TypeError, ValueError),
)


@dataclass(frozen=True)
class Case:
    """One call of intraslice.prune.

    Attributes:
        name: what the lines of the report call it.
        model: folder of the dense model, below the folder of models.
        arguments: of the call, without the model and the output.
        folder: where its output lies, below the folder of a checkout's results.
    """

    name: str
    model: str
    arguments: dict[str, Any]
    folder: str


@dataclass(frozen=True)
class Ending:
    """How a case ended in one checkout.

    Attributes:
        error: class of the error; empty when a checkpoint was written.
        message: its sentence.
        refused: whether it is one of the package's own errors.
    """

    error: str = ""
    message: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the comparison of one case says.

    Attributes:
        difference: the first difference; empty when there is none.
        note: what may differ but should be looked at.
    """

    difference: str = ""
    note: str = ""


@dataclass
class Worker:
    """The process that prunes some of the cases with one checkout.

    Attributes:
        checkout: folder of the checkout.
        work: working directory; its outputs and log lie there.
        cases: what it prunes.
        process: None until it starts.
    """

    checkout: Path
    work: Path
    cases: list[Case]
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        """Start the process."""
        self.work.mkdir(parents=True)
        (self.work / "cases.json").write_text(json.dumps([asdict(case) for case in self.cases]))
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.checkout / "src"),
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(self.checkout)]
        with (self.work / "log.txt").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=self.work, env=environment, stdout=log, stderr=log)

    def endings(self) -> dict[str, Ending]:
        """Return how its cases have ended so far, by folder."""
        file = self.work / "endings.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return {row.pop("folder"): Ending(**row) for row in rows}


def build_model(name: str, folder: Path) -> None:
    """Save a seeded model once per stored dtype, with its tokenizer; weights are large enough that layers matter."""
    model_type, fields = FAMILIES[name]
    torch.manual_seed(list(FAMILIES).index(name))
    config = CONFIG_MAPPING[model_type](**{**COMMON, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    for dtype_name, dtype in DTYPES.items():
        model.to(dtype).save_pretrained(folder / f"{name}-{dtype_name}")
        build_tokenizer().save_pretrained(folder / f"{name}-{dtype_name}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes: ids 0..255 are bytes, then <s>, </s>, <pad>."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def build_text(path: Path) -> None:
    """Write a calibration text of made-up words."""
    chooser = random.Random(0)
    words = ["".join(chooser.choices("abcdefghijklmnopqrstuvwxyz", k=chooser.randint(1, 9))) for _ in range(600)]
    path.write_text(" ".join(words) + ".\n")


def method_options(method: str) -> dict[str, Any]:
    """Return options that let tiny layers shrink in small steps, only those that the method reads."""
    options: dict[str, Any] = {} if method in WHOLE_MODEL else {"ffn.ffn_multiple": 1}
    return {**options, "attention.head_multiple": 2} if method in NARROWING else options


def list_calls(methods: Sequence[str]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield a name, the arguments of the call, and whether models stored in bfloat16 are pruned that way too."""
    for method in methods:
        options = {**RUN, **method_options(method)}
        for sparsity in (0.0, 0.3):
            yield f"{method} {sparsity:g}", {"method": method, "sparsity": sparsity, "options": options}, True
        for variant in VARIANTS.get(method, ()):
            changes = dict(variant)
            sparsity = changes.pop("sparsity", 0.3)
            label = " ".join(f"{option}={value}" for option, value in changes.items() if value is not None)
            changed = {option: value for option, value in {**options, **changes}.items() if value is not None}
            arguments = {"method": method, "sparsity": sparsity, "options": changed}
            yield f"{method} {sparsity:g} {label}".rstrip(), arguments, False
        if method == "intraslice":
            for target, multiples in TARGETS.items():
                arguments = {"method": method, "sparsity": 0.3, "target": target, "options": {**RUN, **multiples}}
                yield f"{method} 0.3 target={target}", arguments, False


def list_cases(families: Sequence[str], methods: Sequence[str], text: Path) -> list[Case]:
    """Return what both checkouts are asked to do."""
    calibration = {"calibration.num_samples": 4, "calibration.seqlen": SEQLEN}
    cases: list[Case] = []
    for family in families:
        for name, arguments, in_bfloat16 in list_calls(methods):
            call = {**arguments, "calibration": str(text), "options": {**calibration, **arguments["options"]}}
            for dtype in DTYPES if in_bfloat16 else ("float32",):
                model = f"{family}-{dtype}"
                cases.append(Case(f"{model}: {name}", model, call, f"{len(cases):04d}"))
    return cases


def run_cases(checkout: Path, work: Path) -> None:
    """Prune every case with the package of the checkout and write down how it ended: what a worker does."""
    # Imported here only: the process that compares must not depend on either checkout.
    import intraslice
    from intraslice.errors import IntraSliceError

    source = Path(str(intraslice.__file__)).resolve()
    if not source.is_relative_to(checkout / "src"):
        raise SystemExit(f"intraslice was imported from {source}, not from {checkout}.")
    with (work / "endings.jsonl").open("w") as log:
        for row in json.loads((work / "cases.json").read_text()):
            case = Case(**row)
            ending = Ending()
            try:
                intraslice.prune(str(work.parent / "models" / case.model), output=case.folder, **case.arguments)
            except IntraSliceError as error:
                ending = Ending(type(error).__name__, str(error), True)
            except CRASHES as error:
                ending = Ending(type(error).__name__, str(error))
            log.write(json.dumps({"folder": case.folder, **asdict(ending)}) + "\n")
            log.flush()


def wait_for(workers: Sequence[Worker], jobs: int) -> None:
    """Run the workers, at most `jobs` at a time, with a progress line now and then."""
    waiting, running, last = list(workers), list[Worker](), time.monotonic()
    total = sum(len(worker.cases) for worker in workers)
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(waiting.pop(0))
            running[-1].start()
        time.sleep(0.2)
        running = [worker for worker in running if worker.process is not None and worker.process.poll() is None]
        if time.monotonic() - last > 20:
            last = time.monotonic()
            print(f"... {sum(len(worker.endings()) for worker in workers)} of {total} prunes", flush=True)
    for worker in workers:
        if worker.process is not None and worker.process.returncode:
            tail = "".join((worker.work / "log.txt").read_text(errors="replace").splitlines(keepends=True)[-20:])
            print(f"the process of {worker.checkout} ended with status {worker.process.returncode}:\n{tail}")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint by name."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}
    return weights


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor: NaNs and the sign of zeros count."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def compare_weights(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> str:
    """Return what differs first, or an empty string."""
    if not before:
        return "no weights were written"
    if before.keys() != after.keys():
        names = sorted(before.keys() ^ after.keys())
        return f"{len(names)} tensors in one output only, first {names[0]}"
    different = [
        name
        for name, tensor in before.items()
        if (tensor.dtype, tensor.shape) != (after[name].dtype, after[name].shape)
        or raw_bytes(tensor) != raw_bytes(after[name])
    ]
    if not different:
        return ""
    old, new = before[different[0]], after[different[0]]
    text = f"{len(different)} of {len(before)} tensors differ, first {different[0]}: "
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return text + f"{old.dtype} {list(old.shape)} became {new.dtype} {list(new.shape)}"
    largest = (old.double() - new.double()).abs().max().item()
    return text + f"largest absolute difference {largest:.3g}"


def read_shapes(folder: Path) -> dict[str, Any]:
    """Return what config.json says about the shapes of layers."""
    config = json.loads((folder / "config.json").read_text())
    return {
        "intraslice.layers": (config.get("intraslice") or {}).get("layers"),
        "per_layer_config": config.get("per_layer_config"),
    }


def compare_case(case: Case, workers: Sequence[Worker], endings: Sequence[Ending | None]) -> Verdict:
    """Compare one case of the worker before with that of the worker after."""
    old, new = endings
    if old is None or new is None:
        return Verdict("its process ended earlier")
    if old.error != new.error:
        said = [ending.error and f"{ending.error} ({ending.message})" or "a checkpoint" for ending in (old, new)]
        return Verdict(f"{said[0]} became {said[1]}")
    if old.error:
        if not (old.refused and new.refused):
            return Verdict(f"both crash with {old.error}: {old.message} / {new.message}")
        return Verdict(note="" if old.message == new.message else f"{old.message} / {new.message}")
    before, after = (worker.work / case.folder for worker in workers)
    difference = compare_weights(read_weights(before), read_weights(after))
    shapes = read_shapes(before), read_shapes(after)
    wrong = [name for name, value in shapes[0].items() if shapes[1][name] != value]
    return Verdict("; ".join(filter(None, [difference, *(f"{name} of config.json differs" for name in wrong)])))


def compare_all(pairs: Sequence[tuple[Worker, Worker]]) -> bool:
    """Print what differs and a summary; return whether everything is equal."""
    total = equal = 0
    refusals: Counter[str] = Counter()
    for pair in pairs:
        ended = [worker.endings() for worker in pair]
        for case in pair[0].cases:
            endings = [by_folder.get(case.folder) for by_folder in ended]
            verdict = compare_case(case, pair, endings)
            total += 1
            equal += not verdict.difference
            if verdict.difference:
                print(f"DIFFERS {case.name}: {verdict.difference}")
            elif endings[0] is not None and endings[0].error:
                refusals[endings[0].message] += 1
            if verdict.note:
                print(f"note    {case.name}: the sentences of the error differ: {verdict.note}")
    for message, count in refusals.items():
        print(f"{count} cases refused by both: {message}")
    print(f"{total} cases, {equal} equal")
    return equal == total


def parse_names(text: str, known: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return the names of a comma-separated list, in the order of `known`."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            parser.error(f"unknown name {name!r}; names are {', '.join(known)}")
    return [name for name in known if name in names]


def main() -> int:
    """Build the models, prune them with both checkouts, compare; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout whose numbers are right")
    parser.add_argument("after", type=Path, help="checkout to compare with it")
    parser.add_argument("--methods", default=",".join(METHODS), help="all unless given: %(default)s")
    parser.add_argument("--families", default=",".join(FAMILIES), help="all unless given: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; 2 is one per checkout")
    arguments = parser.parse_args()
    checkouts = [path.expanduser().resolve() for path in (arguments.before, arguments.after)]
    for checkout in checkouts:
        if not (checkout / "src" / "intraslice").is_dir():
            parser.error(f"{checkout} has no src/intraslice")
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    methods = parse_names(arguments.methods, METHODS, parser)
    families = parse_names(arguments.families, list(FAMILIES), parser)

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        work = Path(name).resolve()
        for family in families:
            build_model(family, work / "models")
        build_text(work / "text.txt")
        cases = list_cases(families, methods, work / "text.txt")
        shares = max(1, arguments.jobs // 2)
        pairs = [
            (
                Worker(checkouts[0], work / f"before-{share}", cases[share::shares]),
                Worker(checkouts[1], work / f"after-{share}", cases[share::shares]),
            )
            for share in range(shares)
        ]
        print(f"{len(cases)} cases in each checkout", flush=True)
        wait_for([worker for pair in pairs for worker in pair], arguments.jobs)
        return 0 if compare_all(pairs) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        run_cases(Path(sys.argv[2]), Path.cwd())
    else:
        sys.exit(main())
