"""The folders and commands that `tests/faults/test_fuzz.py` spoils, and what must hold whatever comes in.

Commands run in a forked process (`support.served`), so that one that never ends, or dies, is a finding like the others.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from intraslice.comparison.document import against_dense
from intraslice.comparison.tables import write_outputs
from intraslice.recipes.recipe import load_recipe
from support.gguf_files import write_gguf
from support.malformed import (
    SETTINGS,
    SPOILT_TEMPLATES,
    WORDS,
    dump,
    spoilt_bytes,
    spoilt_gguf,
    spoilt_json,
    spoilt_lines,
    spoilt_yaml,
)
from support.prune import prune
from support.sample_comparison import sample
from support.served import Ended, Server
from support.task_rows import ROWS, write_tasks
from support.tiny import make_tiny
from support.tiny_composites import make_composite

GGUF_KEYS = (
    *("llama.context_length", "llama.block_count", "llama.embedding_length", "llama.feed_forward_length"),
    *("llama.attention.head_count", "llama.attention.head_count_kv", "llama.rope.dimension_count", "llama.vocab_size"),
    *("llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base", "general.architecture", "general.name"),
    *("tokenizer.ggml.model", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.tokens"),
)
EXTRA_MEMORY = 1 << 30
"""Bytes that a command may take besides twice the size of its file, and besides what the program has at its start."""
TEXT = ("--text", "{root}/text.txt", "--seqlen", "16", "--windows", "1")
DRY = ("--sparsity", "0.3", "--dry-run")
RUN = ("--sparsity", "0.3", "--num-samples", "2", "--seqlen", "16", "--calibration", "{root}/text.txt", "-o", "{out}")
BENCH = ("--prompt-tokens", "8", "--decode-tokens", "1", "--repetitions", "1")
HEAL = ("--calibration", "{root}/text.txt", "--seqlen", "16", "--held-out", "1", "--budget", "32", "--lr", "1e-9")
SAMPLED = ("--sparsity", "0.3", "--num-samples", "2", "--seqlen", "16", "--calibration", "self", "-o", "{out}")
OF_DENSE = (
    ("inspect", "{here}"),
    ("prune", "{here}", *DRY),
    ("prune", "{here}", *RUN),
    ("eval", "{here}", *TEXT),
    ("prune", "{here}", *SAMPLED),
    ("bench", "{here}", *BENCH),
)
OF_PRUNED = (
    ("inspect", "{here}"),
    ("eval", "{here}", *TEXT),
    ("bench", "{here}", *BENCH),
    ("bench", "{here}", "--layers", *BENCH),
    ("heal", "{here}", "-o", "{out}", "--batch-size", "1", *HEAL),
    ("export", "{here}", "--to", "padded", "--no-verify", "-o", "{out}"),
    ("export", "{here}", "--to", "gguf", "--no-verify", "-o", "{out}"),
    ("export", "{here}", "--to", "stock", "--no-verify", "-o", "{out}"),
)


@dataclass(frozen=True)
class Target:
    """A file of a good folder, what may be put into its place, and the commands that read it."""

    name: str
    file: Path
    spoilt: st.SearchStrategy[bytes]
    commands: tuple[tuple[str, ...], ...]


class Ground:
    """Good folders of every kind in `root`; one file of them is spoilt at a time, and put back."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.marker = root / "code-was-run"
        (root / "temporary").mkdir()
        self.folders = {
            "dense": make_tiny("llama", root / "dense"),
            "sharded": make_tiny("qwen2", root / "sharded", tie_word_embeddings=True),
            "composite": make_composite("mistral3", root / "composite"),
            "pruned": root / "pruned",
        }
        prune(self.folders["dense"], self.folders["pruned"])
        split_weights(self.folders["sharded"])
        (root / "text.txt").write_text("Some words, and some more words. " * 40)
        for folder in self.folders.values():
            for name in ("torch", "tokenization_x", "modeling_x", "configuration_x"):
                (folder / f"{name}.py").write_text(f"open({str(self.marker)!r}, 'w').write('x')\n")
        self.targets = [*self._models(), *self._others()]
        self.before = self._listing()

    def _models(self) -> Iterator[Target]:
        for folder, commands in (
            ("dense", OF_DENSE),
            ("sharded", OF_DENSE),
            ("composite", OF_DENSE),
            ("pruned", OF_PRUNED),
        ):
            path = self.folders[folder]
            for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
                yield self._json(f"{file} of a {folder} model", path / file, commands)
            yield self._json(f"index of a {folder} model", path / "model.safetensors.index.json", commands, extra=())
            yield Target(f"chat template of a {folder} model", path / "chat_template.jinja", SPOILT_TEMPLATES, commands)
            for weights in sorted(path.glob("*.safetensors"))[:1]:
                content = weights.read_bytes()
                yield Target(f"weights of a {folder} model", weights, spoilt_bytes(content), commands)
                yield Target(f"header of a {folder} model", weights, spoilt_header(content), commands)

    def _others(self) -> Iterator[Target]:
        root, pruned = self.root, self.folders["pruned"]
        write_gguf(root / "model.gguf", "llama")
        content = (root / "model.gguf").read_bytes()
        gguf = tuple(tuple(word.replace("{here}", "{file}") for word in command) for command in OF_DENSE)
        yield Target("a GGUF file", root / "model.gguf", spoilt_gguf(content, GGUF_KEYS), gguf)
        report = (("report", "{here}", "-o", "{out}"), ("inspect", "{here}"))
        yield self._json("result.json", pruned / "result.json", report, extra=())
        document = sample(layers=3, methods=("intraslice", "naive"), sparsities=(0.2, 0.3))
        document["protocol"]["calibration"]["tokens"] = {}
        write_outputs({**document, "cells": against_dense(document["cells"])}, root / "compared")
        table = (("report", "{here}", "-o", "{out}"), ("report", "{here}", "-o", "{out}", "--table", "{out}.md"))
        yield self._json("comparison.json", root / "compared" / "comparison.json", table, extra=())
        recipe = yaml.safe_dump(load_recipe(None, {"model": str(self.folders["dense"]), "sparsity": 0.3}).to_dict())
        (root / "recipe.yaml").write_text(recipe)
        yield Target(
            "a recipe", root / "recipe.yaml", spoilt_yaml(recipe.splitlines()), (("prune", "--recipe", "{file}", *DRY),)
        )
        compared = (
            *("title: x", f"models: [{self.folders['dense']}]", "methods: [naive]", "sparsities: [0.2]"),
            *("calibration: {source: builtin, num_samples: 2, seqlen: 16}", "evaluation: {seqlen: 16, windows: 1}"),
            *("options: {attention.score: energy}", "sweeps: []", "analysis: false", "speed: {prompt_tokens: 8}"),
        )
        (root / "comparison.yaml").write_text("\n".join(compared))
        yield Target(
            "a comparison file",
            root / "comparison.yaml",
            spoilt_yaml(compared),
            (("compare", "{file}", "-o", "{out}", "--dry-run"),),
        )
        dense = str(self.folders["dense"])
        rows = [{"text": f"Some words, number {number}. " * 9, "other": [number]} for number in range(4)]
        (root / "text.jsonl").write_bytes(b"\n".join(map(dump, rows)))
        evaluate = (("eval", dense, "--text", "{file}", "--seqlen", "16", "--windows", "1"),)
        yield Target("JSON lines of text", root / "text.jsonl", spoilt_lines(rows), evaluate)
        yield Target("a text", root / "text.txt", spoilt_bytes((root / "text.txt").read_bytes()), evaluate)
        for task in ("arc_easy", "piqa", "hellaswag"):
            write_tasks(root / f"tasks-{task}", {task: ROWS[task]})
            yield Target(
                f"questions of {task}",
                root / f"tasks-{task}" / f"{task}.jsonl",
                spoilt_lines(ROWS[task]),
                (("eval", dense, "--tasks", task, "--task-data", "{here}", "--limit", "1"),),
            )

    def _json(self, name: str, file: Path, commands: Any, **how: Any) -> Target:
        content = json.loads(file.read_text()) if file.is_file() else {"weight_map": {"x": "model.safetensors"}}
        return Target(name, file, spoilt_json(content, **how), commands)

    def _listing(self) -> dict[str, int]:
        return {str(path): path.stat().st_size for path in self.root.rglob("*") if path.is_file()}

    def unchanged(self) -> bool:
        """Return whether all files are the ones that were made at the start."""
        return self._listing() == self.before

    def try_unspoilt(self, server: Server) -> list[Outcome]:
        """Run every command on the good files, in this process."""
        given = {
            (command, target.file) for target in self.targets for command in target.commands if target.file.exists()
        }
        words = {tuple(self._filled(word, file) for word in command) for command, file in given}
        return [self._judged(list(one), 0, server.run_here(list(one))) for one in sorted(words)]

    def try_file(self, target: Target, content: bytes, command: tuple[str, ...], server: Server) -> Outcome:
        """Run a command on a spoilt file, and put the file back."""
        before = target.file.read_bytes() if target.file.is_file() else None
        target.file.write_bytes(content)
        try:
            return self._run([self._filled(word, target.file) for word in command], len(content), server)
        finally:
            target.file.unlink() if before is None else target.file.write_bytes(before)

    def try_words(self, words: list[str], server: Server) -> Outcome:
        """Run a prune with these options."""
        return self._run(["prune", str(self.folders["dense"]), "-o", str(self.root / "out"), *words], 0, server)

    def _filled(self, word: str, file: Path) -> str:
        places = {"{here}": file.parent, "{file}": file, "{root}": self.root, "{out}": self.root / "out"}
        for mark, path in places.items():
            word = word.replace(mark, str(path))
        return word

    def _run(self, words: list[str], num_bytes: int, server: Server) -> Outcome:
        return self._judged(words, num_bytes, server.run(words))

    def _judged(self, words: list[str], num_bytes: int, ended: Ended) -> Outcome:
        wrong = [ended.died, ended.traceback]
        errors = [line for line in ended.messages.splitlines() if line.startswith("error: ")]
        if ended.status == 2 and len(errors) != 1:
            wrong.append(f"{len(errors)} sentences: {errors[:3]}")
        if ended.status == 2 and errors and not errors[0].removeprefix("error: ").strip():
            wrong.append("an empty sentence")
        if ended.status not in (0, 2) and not any(wrong):
            wrong.append(f"status {ended.status}: {ended.messages[-1000:]}")
        if "panicked at" in ended.compiled or "Traceback" in ended.compiled:
            wrong.append(f"besides, it wrote {ended.compiled[:300]!r}")
        if ended.more_bytes > 2 * num_bytes + EXTRA_MEMORY:
            wrong.append(f"{ended.more_bytes / 1e6:.0f} MB of memory for a file of {num_bytes} bytes")
        wrong += ended.connections
        if self.marker.exists():
            self.marker.unlink()
            wrong.append("code was run")
        wrong.append(self._left(ended.status))
        return Outcome(words, ended, "\n".join(filter(None, wrong)))

    def _left(self, status: int) -> str:
        """Return what a refused command has left behind, and remove it; what a successful one writes is its own."""
        cache = Path(os.environ["INTRASLICE_CACHE"])
        # What is whole there is kept for the next command, whatever became of this one.
        found = [*self.root.glob("out*"), *self.root.glob(".out*"), *cache.glob("*.partial-*"), *cache.glob("*.tmp")]
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        temporary = list((self.root / "temporary").iterdir())
        for path in temporary:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return f"left {[path.name for path in found + temporary]}" if temporary or (status and found) else ""


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        words: the command.
        ended: how it ended.
        wrong: what must not have happened; "" when all is well.
    """

    words: list[str]
    ended: Ended
    wrong: str


@st.composite
def options(draw: st.DrawFn) -> list[str]:
    """Draw options of prune, at least one of them with a strange value."""
    found = ["--sparsity", "0.3"]
    for _ in range(draw(st.integers(1, 2))):
        found += [draw(st.sampled_from(SETTINGS)), draw(st.sampled_from(WORDS))]
    return [*found, "--dry-run"]


def split_weights(folder: Path) -> None:
    """Cut the weights of a folder into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@st.composite
def spoilt_header(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a safetensors file whose header says something else, with the length that belongs to it."""
    length = int.from_bytes(content[:8], "little")
    header = draw(spoilt_json(json.loads(content[8 : 8 + length]), ("__metadata__", "x")))
    return len(header).to_bytes(8, "little") + header + content[8 + length :]
