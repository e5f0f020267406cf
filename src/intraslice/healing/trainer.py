"""Training a student through transformers' Trainer: our loss, our measurements, everything else is its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from intraslice.errors import NumericalError
from intraslice.healing.data import HealingText, Sequences
from intraslice.healing.loss import Distillation
from intraslice.healing.options import HealOptions
from intraslice.healing.workdir import HealDir
from intraslice.numbers import count, duration
from intraslice.placement import Placement
from intraslice.progress import Progress
from intraslice.results.healing import CurvePoint

MAX_RISE = 2.0
"""A held-out divergence of this many times that of the start means that the training has diverged."""

WARM_UP, WARM_UP_STEPS = 0.05, 20
"""Share of the steps in which the learning rate rises; at least so many steps, but not more than a third of them."""
LAST_LR = 0.1


class HealTrainer(Trainer):
    """A Trainer whose loss is the distance to a teacher; it sums the losses of its steps for the curve."""

    def __init__(self, distillation: Distillation, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._distillation = distillation
        self._losses: list[Tensor] = []

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the loss of the student on the sequences of one forward pass."""
        with self.accelerator.autocast():
            loss = self._distillation.loss(inputs["input_ids"])
        self._losses.append(loss.detach())
        return loss

    def held_out(self, tokens: Tensor, batch: int) -> float:
        """Return the divergence from teacher to student on sequences [N, T]."""
        with self.accelerator.autocast():
            return self._distillation.held_out(tokens, batch)

    def take_loss(self) -> float:
        """Return the mean loss since the last call."""
        taken, self._losses = self._losses, []
        return float(torch.stack(taken).mean())

    def last_loss(self) -> float:
        """Return the loss of the last forward pass."""
        return float(self._losses[-1])


class Watch(TrainerCallback):
    """Measures on the held-out text, keeps the best weights, says how far it is, and stops a training that diverges.

    Args:
        trainer: whose steps are watched.
        work: where the best weights and the curve are kept.
        held_out: token ids [H, T].
        options: settings.
        steps: of the whole training.
        progress: is told how far it is.
        advance: is called with the tokens of each step.
    """

    def __init__(
        self,
        trainer: HealTrainer,
        work: HealDir,
        held_out: Tensor,
        options: HealOptions,
        steps: int,
        *,
        progress: Progress,
        advance: Callable[[int], None],
    ) -> None:
        self._trainer, self._work, self._held_out = trainer, work, held_out
        self._options, self._steps = options, steps
        self._progress, self._advance = progress, advance
        self._every = options.evaluation_steps(steps)
        self._before = work.curve[-1].seconds if work.curve else 0.0
        self._from_step = work.step
        self._started = time.monotonic()
        self.stopped: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure where it starts from."""
        if not self._work.curve:
            self._measure(0, None)
        if not math.isfinite(self._work.curve[0].kl):
            raise NumericalError(
                "the checkpoint or its dense model gives NaN or infinite predictions before the first step."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step; every so often measure, and have everything saved that a resumed run needs."""
        step = state.global_step
        self._advance(self._options.step_tokens)
        if not math.isfinite(self._trainer.last_loss()):
            self._stop(f"the training loss is not finite in step {step} of {self._steps}", control)
        elif step % self._every == 0 or step == self._steps:
            point = self._measure(step, self._trainer.take_loss())
            start = self._work.curve[0].kl
            if not point.kl <= MAX_RISE * start:
                self._stop(
                    f"the held-out divergence rose from {start:.4f} to {point.kl:.4f} in step {step} of {self._steps}",
                    control,
                )
            else:
                control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note that everything of this step is on the disk; only now older states may go."""
        self._work.commit(state.global_step)

    def _stop(self, reason: str, control: TrainerControl) -> None:
        self.stopped = reason
        control.should_training_stop = True

    def _measure(self, step: int, loss: float | None) -> CurvePoint:
        kl = self._trainer.held_out(self._held_out, max(1, self._options.batch_size // self._options.accumulate))
        seconds = self._before + time.monotonic() - self._started
        point = CurvePoint(
            step=step, tokens=step * self._options.step_tokens, loss=loss, kl=kl, seconds=round(seconds, 3)
        )
        self._work.curve.append(point)
        if self._work.best is point:
            self._work.keep_best(step, trained(self._trainer.model))
        self._say(point)
        return point

    def _say(self, point: CurvePoint) -> None:
        text = f"healing step {point.step} of {self._steps}: held-out KL {point.kl:.4f}"
        done = point.step - self._from_step
        if done > 0:
            rate = done * self._options.step_tokens / (time.monotonic() - self._started)
            left = (self._steps - point.step) * self._options.step_tokens / rate
            text += f", loss {point.loss:.4f}, {count(rate)} tokens/s, {duration(left)} left"
        self._progress.note(text)


def trained(model: Any) -> dict[str, Tensor]:
    """Return the parameters that are trained, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(
    model: Any,
    distillation: Distillation,
    text: HealingText,
    options: HealOptions,
    steps: int,
    work: HealDir,
    placement: Placement,
    progress: Progress,
) -> str | None:
    """Train the student, from where an interrupted run has stopped; the best weights are in the work folder then.

    Args:
        model: the student, or what peft has made of it.
        distillation: of the same student.
        text: sequences.
        options: settings.
        steps: of the optimizer in all.
        work: the work folder.
        placement: where to train.
        progress: shows the tokens.

    Returns:
        Why it ended early, or None.
    """
    trainer = HealTrainer(
        distillation,
        model=model,
        args=training_arguments(options, steps, work.path, placement),
        train_dataset=Sequences(text.train, steps * options.batch_size, options.seed),
        data_collator=_stack,
    )
    trainer.remove_callback(PrinterCallback)
    with progress.step("healing (tokens)", steps * options.step_tokens) as advance:
        advance(work.step * options.step_tokens)
        watch = Watch(trainer, work, text.held_out, options, steps, progress=progress, advance=advance)
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=str(work.state_path) if work.step else None)
    return watch.stopped


def warm_up_steps(steps: int) -> int:
    """Return in how many of the steps the learning rate rises.

    Adam's first steps are as long as all others, although the mean of the first few gradients is mostly noise.
    """
    return max(math.ceil(WARM_UP * steps), min(WARM_UP_STEPS, math.ceil(steps / 3)))


def training_arguments(options: HealOptions, steps: int, folder: Path, placement: Placement) -> TrainingArguments:
    """Return the settings of the Trainer."""
    on_cpu = placement.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size // options.accumulate,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.peak_lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": LAST_LR},
        warmup_steps=warm_up_steps(steps),
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=options.rounds(on_cpu),
        use_cpu=on_cpu,
        seed=options.seed,
        data_seed=options.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    # More than one accelerator in one process would make it copy the model to all of them in every step.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def load_best(model: Any, work: HealDir) -> None:
    """Put the best weights back."""
    best = work.load_best()
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(best[name])


def _stack(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack([item["input_ids"] for item in items])}
