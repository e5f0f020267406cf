"""One verification for all exports: run the result on a prompt, compare its logits with those of the checkpoint.

T tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from intraslice.checkpoint.composite import load_arguments
from intraslice.checkpoint.pruned import PrunedCheckpoint
from intraslice.errors import CheckpointError
from intraslice.quiet import quiet

PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Tolerance:
    """By how much a logit may differ: `absolute` + `relative` * the largest logit of the checkpoint.

    Attributes:
        absolute: part that does not depend on the model.
        relative: part of the largest logit.
        reason: what makes logits differ although nothing is wrong.
    """

    absolute: float
    relative: float
    reason: str


_ORDER = "computed in float32 on both sides; sums are taken in another order and angles are rounded differently"
_SCALED = "the export's weights are rounded once more than the checkpoint's, and every layer adds to the error; "

TOLERANCES: dict[tuple[str, str], Tolerance] = {
    ("transformers", "auto"): Tolerance(
        1e-2, 0.0, "weights keep their dtype, only scaled queries are rounded again; " + _ORDER
    ),
    ("transformers", "float32"): Tolerance(1e-2, 0.0, _ORDER),
    ("transformers", "float16"): Tolerance(1e-2, 0.02, _SCALED + "11 bits of mantissa"),
    ("transformers", "bfloat16"): Tolerance(1e-2, 0.1, _SCALED + "8 bits of mantissa"),
    ("onnxruntime", "float32"): Tolerance(1e-3, 0.0, _ORDER + "; the weights are the same, so this is little"),
    ("onnxruntime", "float16"): Tolerance(0.0, 0.05, "weights, activations and cache are all rounded to float16"),
    ("llama.cpp", "float32"): Tolerance(0.05, 0.0, _ORDER + ", in kernels that differ by machine"),
    ("llama.cpp", "float16"): Tolerance(0.05, 0.01, "activations are rounded to the dtype of the matrix as well"),
    ("llama.cpp", "bfloat16"): Tolerance(0.05, 0.05, "activations are rounded to the dtype of the matrix as well"),
}
"""(runtime, dtype of the export) -> tolerance; "auto" is the dtype of the checkpoint."""

# What is said when the difference is more than that.
_SENTENCES = {
    "transformers": "the export computes other logits than the checkpoint (difference {difference:.3g}, at most "
    "{allowed:.3g} is rounding); nothing was written. Please report this.",
    "onnxruntime": "the ONNX graphs of {name!r} compute other logits than the checkpoint (largest difference "
    "{difference:.2g}, allowed {allowed:.2g}); nothing was written. Please report this model.",
    "llama.cpp": "llama.cpp computes other logits than the checkpoint: they differ by up to {difference:.3g}, more "
    "than rounding explains ({allowed:.3g}); the file was not kept",
}


@torch.no_grad()
def verify(
    checkpoint: PrunedCheckpoint,
    run: Callable[[Tensor], Tensor],
    *,
    runtime: str,
    dtype: str,
    context_length: int = PROMPT_TOKENS,
) -> float:
    """Compare the logits of an export with those of the checkpoint.

    Args:
        checkpoint: what was exported.
        run: token ids [1, T] -> logits of the export [1, T, vocabulary]. What it loads is released before the
            checkpoint is loaded, so one copy of the weights at a time is in memory.
        runtime: what `run` runs the export in; with `dtype` a row of `TOLERANCES`.
        dtype: of the export's weights.
        context_length: tokens up to which the export is exact; a longer prompt is cut.

    Returns:
        The largest difference of a logit.

    Raises:
        CheckpointError: the difference is more than rounding.
    """
    tokens_1T = prompt_tokens(checkpoint.config.vocab_size)[:, :context_length]
    found = run(tokens_1T)
    with quiet(everything=True):
        wanted = reference_logits(checkpoint, tokens_1T)
    tolerance = TOLERANCES[runtime, dtype]
    difference = float((found.float() - wanted).abs().max())
    allowed = tolerance.relative * float(wanted.abs().max()) + tolerance.absolute
    # Written such that NaN fails too.
    if not difference <= allowed:
        sentence = _SENTENCES[runtime]
        raise CheckpointError(sentence.format(name=checkpoint.name, difference=difference, allowed=allowed))
    return difference


def prompt_tokens(vocab_size: int) -> Tensor:
    """Return the token ids that exports are verified with, [1, T]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (1, PROMPT_TOKENS), generator=generator)


@torch.no_grad()
def reference_logits(checkpoint: PrunedCheckpoint, tokens_1T: Tensor) -> Tensor:
    """Return the logits of the checkpoint itself in float32, [1, T, vocabulary]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        dtype=torch.float32,
        **load_arguments(checkpoint.config, of_composite=checkpoint.composite),
    ).eval()
    return model(tokens_1T).logits
