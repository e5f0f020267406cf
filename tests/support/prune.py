"""The one way in which tests of the engine prune: everything below the command line, on calibration tokens of theirs.

No other test calls `prune_checkpoint`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import intraslice  # noqa: F401 - registers the pruned classes
from intraslice.checkpoint.source import open_checkpoint
from intraslice.data.calibration import Calibration
from intraslice.engine.run import prune_checkpoint
from intraslice.progress import Progress, SilentProgress
from intraslice.pruning import fitted_recipe, make_job
from intraslice.recipes.recipe import load_recipe
from intraslice.results.result import PruneResult
from support.tiny import VOCAB_SIZE

NARROWER_HEADS = ("intraslice", "iter-pca", "ada-h", "paper", "transact", "modegpt", "disp-llm")
WHOLE_HEADS = ("naive", "wanda-sp", "flap", "slimllm", "sobp", "llm-pruner", "llm-surgeon", "tyr")
BLOCKWISE = (*NARROWER_HEADS, *WHOLE_HEADS)
QUICK = {
    "llm-surgeon": {"allocation.shots": 2},
    "disp-llm": {"allocation.gate_steps": 5},
    "tyr": {"allocation.search_levels": 3, "allocation.search_generations": 2, "allocation.search_offspring": 3},
}
"""Less of what only takes time: two shots are several, gates differ long before they are trained, and one good model is
soon found."""


def fine_steps(method: str = "intraslice") -> dict[str, int]:
    """Return the options that cut tiny models in steps of single channels, as far as the method reads them."""
    steps: dict[str, int] = {}
    if method in NARROWER_HEADS:
        steps["attention.head_multiple"] = 2
    if method in BLOCKWISE:
        steps["ffn.ffn_multiple"] = 1
    return steps


def calibration(num_samples: int = 8, seqlen: int = 32, seed: int = 0) -> Calibration:
    """Return walks over the vocabulary: neighbouring tokens are related, so the gradients mean something."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 5, (num_samples, seqlen), generator=generator)
    tokens = (steps.cumsum(1) + torch.randint(0, VOCAB_SIZE, (num_samples, 1), generator=generator)) % VOCAB_SIZE
    return Calibration(tokens=tokens, source="walk", seed=seed, fingerprint=f"walk-{num_samples}-{seqlen}-{seed}")


def prune(
    folder: Path,
    output: Path,
    method: str = "intraslice",
    sparsity: float = 0.3,
    *,
    on: Calibration | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a folder with a recipe.

    Args:
        folder: the dense model.
        output: where the smaller one goes.
        method: name of the method.
        sparsity: the budget.
        on: calibration tokens; `calibration()` unless given.
        overwrite: replace an existing output.
        resume: go on with an interrupted run.
        progress: shows or interrupts the run.
        options: fields of the recipe, a double underscore for the dot: `attention__damping=0.5`.
    """
    named = {name.replace("__", "."): value for name, value in options.items()}
    flags = {"model": str(folder), "method": method, "sparsity": sparsity}
    # Two sequences of 32 or 48 tokens a batch.
    quick = {} if "allocation.rule" in named else QUICK.get(method, {})
    if method == "intraslice":
        quick = {"tune.sites": "none", **quick}
    recipe = load_recipe(None, {**flags, "run.batch_tokens": 96, **fine_steps(method), **quick, **named})
    checkpoint = open_checkpoint(str(folder))
    job = make_job(
        fitted_recipe(recipe, checkpoint.config, checkpoint.spec),
        checkpoint,
        on or calibration(),
        output=output,
        overwrite=overwrite,
        resume=resume,
        command="test",
        progress=progress or SilentProgress(),
    )
    return prune_checkpoint(job)


def load(folder: Path, **kwargs: Any) -> Any:
    """Load a dense or pruned folder with transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Return the logits [B, T, V] of a model, or of the one that a folder holds."""
    return (load(model, **kwargs) if isinstance(model, Path) else model)(tokens).logits


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all stored tensors by name."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found
