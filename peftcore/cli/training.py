"""One run of a comparison: score, train, score again, on transformers' ``Trainer``."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from peftcore.cli.data import Encoded


class Progress(Protocol):
    """Where a run says what it is doing."""

    def phase(self, name: str, total: int) -> None:
        """A stretch of ``total`` steps begins."""

    def advance(self) -> None:
        """One of them is done."""


@dataclass(frozen=True)
class Schedule:
    """What all methods of a comparison have in common."""

    steps: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What one run showed."""

    accuracy_before: float
    accuracy_after: float
    losses: tuple[float, ...]
    seconds_per_step: float


class Reporter(transformers.TrainerCallback):
    """Times the optimizer steps and passes them on to the progress bar."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds = 0.0
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        self.progress.advance()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def run(
    model: nn.Module,
    tokenizer: Any,
    train: list[Encoded],
    held_out: list[Encoded],
    learning_rate: float,
    schedule: Schedule,
    progress: Progress,
) -> Outcome:
    """Train what requires gradients on ``train``, already laid out in batches; score ``held_out`` before and after."""
    reporter = Reporter(progress)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = transformers.Trainer(
            model=model,
            args=arguments(scratch, learning_rate, schedule),
            train_dataset=train,
            eval_dataset=sorted(held_out, key=lambda row: len(row["input_ids"])),
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=predictions,
            callbacks=[reporter],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        before = score(trainer, progress)
        progress.phase("training", schedule.steps)
        trainer.train()
        after = score(trainer, progress)
    return Outcome(before, after, tuple(reporter.losses), reporter.seconds / schedule.steps)


def arguments(scratch: str, learning_rate: float, schedule: Schedule) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=scratch,
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        per_device_eval_batch_size=2 * schedule.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=schedule.steps // 10,
        seed=schedule.seed,
        logging_steps=max(1, schedule.steps // 10),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def score(trainer: transformers.Trainer, progress: Progress) -> float:
    progress.phase("scoring", len(trainer.get_eval_dataloader()))
    return float(trainer.evaluate()["eval_accuracy"])


def predictions(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Keep the predicted class alone: some models return hidden states beside their logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.equal(prediction.predictions, prediction.label_ids)))}
