"""What can be chosen about healing, and how a budget is written. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from intraslice.errors import RecipeError
from intraslice.options import CalibrationOptions

Weights = Literal["full", "lora"]
Precision = Literal["auto", "float32", "bfloat16"]

DEFAULT_LR = {"full": 2e-4, "lora": 5e-4}

_TOKENS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_SECONDS = {"s": 1, "sec": 1, "min": 60, "h": 3600}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """How long a model is healed: one of the two is given.

    Attributes:
        tokens: to train on, repetitions counted.
        seconds: from which the number of steps follows, after their speed was measured.
    """

    tokens: int | None = None
    seconds: float | None = None


# A billion of the largest unit.
_MOST = 1e9


def parse_budget(text: str) -> Budget:
    """Read "300k", "5M", "1G" or "1000000" as tokens, "20min", "90s" or "2h" as time.

    Raises:
        RecipeError: it is none of them, nothing, or beyond all use.
    """
    match = _BUDGET.fullmatch(str(text).strip())
    unit = match[2].lower() if match else ""
    if match is None or unit not in {**_TOKENS, **_SECONDS} or not float(match[1]) < _MOST:
        raise RecipeError(
            f"budget {str(text)[:80]!r} is neither tokens nor a time; write it like 300k, 5M or 1G (tokens), or 90s, "
            "20min or 2h."
        )
    amount = float(match[1])
    if amount <= 0:
        raise RecipeError(f"budget {text!r} is nothing to heal with; give some tokens or some time.")
    if unit in _TOKENS:
        return Budget(tokens=round(amount * _TOKENS[unit]))
    return Budget(seconds=amount * _SECONDS[unit])


@dataclass(frozen=True, kw_only=True)
class HealOptions:
    """Settings of healing.

    Attributes:
        budget: tokens ("300k", "5M") or time ("20min").
        calibration: text, as for `prune`; None takes the text that the model was pruned on, or the default of `prune`.
        text_field: column of a .jsonl or .parquet file.
        seqlen: tokens in a sequence.
        batch_size: sequences in one step of the optimizer.
        accumulate: forward passes that a step is cut into; must divide batch_size.
        lr: peak learning rate; None takes `DEFAULT_LR` of the weights.
        weights: "full" trains the weights themselves, "lora" low-rank additions that are merged in the end.
        rank: of the additions.
        train_embeddings: train the embeddings and the output head too; only for "full".
        hidden_weight: weight of the relative squared error of each layer's output.
        task_weight: weight of the loss of the next token.
        held_out: sequences that are never trained on and decide which weights are kept.
        evaluate_every: steps between two measurements on them; None takes 25, or a twentieth of all if that is more.
        seed: of the choice of sequences, of their order and of the additions.
        device: "auto", "cpu" or a torch device.
        precision: of products in training: "auto" is bfloat16 on an accelerator and float32 on a CPU.
        dtype: of the saved weights: "auto" keeps the checkpoint's, or "float32", "bfloat16", "float16".
    """

    budget: str
    calibration: str | None = None
    text_field: str | None = None
    seqlen: int = 512
    batch_size: int = 4
    accumulate: int = 1
    lr: float | None = None
    weights: Weights = "full"
    rank: int = 16
    train_embeddings: bool = False
    hidden_weight: float = 0.0
    task_weight: float = 0.0
    held_out: int = 16
    evaluate_every: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be, one sentence each."""
        parse_budget(self.budget)
        for name, known in (("weights", get_args(Weights)), ("precision", get_args(Precision))):
            if getattr(self, name) not in known:
                raise RecipeError(f"{name} {getattr(self, name)!r} is unknown; use one of {', '.join(known)}.")
        least = {
            "seqlen": 2,
            "batch_size": 1,
            "accumulate": 1,
            "rank": 1,
            "held_out": 1,
            "evaluate_every": 1,
            "seed": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise RecipeError(f"{name} = {value} is too small; the least is {bound}.")
        for name in ("hidden_weight", "task_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RecipeError(f"{name} = {getattr(self, name)} is no weight of a loss; give 0 or more.")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise RecipeError(f"lr = {self.lr} is no learning rate; give a small positive number such as 2e-4.")
        if self.batch_size % self.accumulate:
            raise RecipeError(
                f"batch_size {self.batch_size} cannot be cut into {self.accumulate} equal forward passes; choose an "
                "accumulate that divides it."
            )
        if self.train_embeddings and self.weights == "lora":
            raise RecipeError("train_embeddings belongs to --weights full; leave one of the two out.")

    @property
    def step_tokens(self) -> int:
        """Tokens in one step of the optimizer."""
        return self.batch_size * self.seqlen

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up."""
        return DEFAULT_LR[self.weights] if self.lr is None else self.lr

    def rounds(self, on_cpu: bool) -> bool:
        """Return whether products are taken in bfloat16."""
        return self.precision == "bfloat16" or (self.precision == "auto" and not on_cpu)

    def evaluation_steps(self, steps: int) -> int:
        """Return how many steps lie between two measurements on the held-out text."""
        return self.evaluate_every or max(25, -(-steps // 20))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self)


def num_steps(tokens: int, options: HealOptions) -> int:
    """Return the steps that a number of tokens is enough for.

    Raises:
        RecipeError: not even for one.
    """
    steps = tokens // options.step_tokens
    if steps < 1:
        raise RecipeError(
            f"a budget of {tokens} tokens is smaller than one step of {options.batch_size} sequences of "
            f"{options.seqlen} tokens ({options.step_tokens}); give more, or a smaller --batch-size or --seqlen."
        )
    return steps


def heal_options(
    calibration: CalibrationOptions, device: str, budget: str, settings: Mapping[str, Any] | None = None
) -> HealOptions:
    """Return the settings of a healing that follows a prune: its text, its seed, its device.

    Args:
        calibration: of the prune.
        device: of the prune.
        budget: of the healing.
        settings: fields that shall not have their defaults.

    Raises:
        RecipeError: the budget is none, or smaller than one step, or a field makes no sense.
    """
    given = dict(settings or {})
    # Sequences that are short enough to prune with are not too long for the model.
    seqlen = given.setdefault("seqlen", min(HealOptions.seqlen, calibration.seqlen))
    given.setdefault("batch_size", max(1, HealOptions.batch_size * HealOptions.seqlen // max(1, seqlen)))
    options = HealOptions(
        budget=budget,
        calibration=calibration.source,
        text_field=calibration.text_field,
        seed=calibration.seed,
        device=device,
        **given,
    )
    tokens = parse_budget(budget).tokens
    if tokens is not None:
        num_steps(tokens, options)
    return options
