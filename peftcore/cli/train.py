"""The job of ``peftcore train``: one method on one task with transformers' ``Trainer``, from a model and a file to an
adapter.

Everything lands in one folder: ``adapter/``, ``checkpoints/``, ``logs/`` for TensorBoard, ``metrics.json``, and
``run.json``, by which ``--resume`` knows that it goes on with the same run.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils.data import DataLoader, Subset
from transformers.integrations.integration_utils import TensorBoardCallback

import peftcore
from peftcore.cli import tasks
from peftcore.cli.run_folder import Keeper, RunFolder, first_process, plain
from peftcore.cli.runs import Run, validated
from peftcore.cli.tasks.task import Prepared, Task
from peftcore.errors import TrainingError
from peftcore.files import write_text
from peftcore.training import PeftcoreCallback

KEPT = 3
"""Checkpoints: the best, the last, and the one before while the next is being written."""


class Display(Protocol):
    """Where a run says what it is doing."""

    def phase(self, name: str, total: int | None) -> None:
        """A stretch of so many steps begins."""

    def advance(self) -> None:
        """One of them is done."""

    def say(self, line: str) -> None:
        """Something to keep on the screen."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `samples` pairs what the model said before with what it says now."""

    method: str
    trainable: int
    total: int
    before: dict[str, float]
    after: dict[str, float]
    steps: int
    seconds: float
    adapter: str
    samples: list[tuple[str, str]]


class AdapterTrainer(transformers.Trainer):
    """The Trainer, with the method's optimizer, and an end to runs whose loss is no number."""

    def __init__(self, injection: peftcore.Injection, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.injection = injection

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.injection.optimizer(
                torch.optim.AdamW, lr=self.args.learning_rate, weight_decay=self.args.weight_decay
            )
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            raise TrainingError(
                f"the loss became {loss.mean().item()} in step {self.state.global_step + 1}: try a smaller learning "
                "rate or a longer warm-up; the last checkpoint is from before"
            )
        return loss


class Watch(transformers.TrainerCallback):
    """Tells the display."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._display.phase("training", state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._display.advance()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        self._display.say(f"step {state.global_step}: {in_words(plain(metrics or {}))}")


def as_json(outcome: Outcome) -> str:
    """For programs."""
    return json.dumps(asdict(outcome), indent=2) + "\n"


def show(outcome: Outcome, console: Console) -> None:
    """For people."""
    table = Table("", "before", "after", box=box.SIMPLE_HEAD)
    for name, after in outcome.after.items():
        table.add_row(name, f"{outcome.before[name]:.4g}", f"{after:.4g}")
    console.print(table)
    for earlier, now in outcome.samples:
        console.print(f"[dim]before:[/dim] {escape(earlier)}\n[dim]after:[/dim]  {escape(now)}\n", highlight=False)
    console.print(
        f"{outcome.method}: {outcome.trainable:,} of {outcome.total:,} values trained in {outcome.steps} steps, "
        f"{outcome.seconds:.0f} s\nadapter: {outcome.adapter}",
        highlight=False,
    )


def in_words(metrics: dict[str, float]) -> str:
    """Numbers on one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def train(run: Run, display: Display, resume: bool = False) -> Outcome:
    """Run it. The adapter is in ``run.out / "adapter"`` afterwards.

    Raises:
        BadInput: what the run names cannot be used.
        TrainingError: the loss is no number, or a disk is full; the last checkpoint is whole.
    """
    began = time.perf_counter()
    task = tasks.find(run.task)
    data = validated(task.Data, run.data, "data")
    folder = RunFolder(run)
    checkpoint = folder.checkpoint(resume)
    display.phase("loading", None)
    transformers.set_seed(run.training.seed)
    prepared = task.prepare(run, data)
    injection = _adapted(run, prepared)
    trainer = _trainer(run, task, prepared, injection, [Keeper(folder), Watch(display)])
    if folder.before is None:
        # Not by trainer.evaluate(): what accelerate prepared for that alone, it does not wrap for several processes.
        trainer.args.eval_on_start = True
        folder.said = _said(prepared)
        folder.note()
    transformers.set_seed(run.training.seed)  # what came before drew a different number of times when resuming
    _trained(trainer, checkpoint)
    display.phase("scoring", None)
    outcome = Outcome(
        method=run.method.name,
        trainable=sum(p.numel() for p in injection.parameters() if p.requires_grad),
        total=sum(p.numel() for p in prepared.model.parameters()),
        before=folder.before or {},
        after=plain(trainer.evaluate()),
        steps=trainer.state.global_step,
        seconds=time.perf_counter() - began,
        adapter=str(folder.adapter),
        samples=list(zip(folder.said, _said(prepared), strict=True)),
    )
    if first_process():
        injection.save(folder.adapter)
        write_text(folder.path / "metrics.json", as_json(outcome))
    return outcome


def _adapted(run: Run, prepared: Prepared) -> peftcore.Injection:
    base = prepared.adapted or prepared.model
    if run.quantize is not None:
        peftcore.quantize(base, run.quantize)
    arguments = run.method.arguments
    if peftcore.method(run.method.name).tags.needs_data:
        arguments["data"] = DataLoader(
            Subset(prepared.train, range(min(LOOKED_AT * run.training.batch_size, len(prepared.train)))),
            batch_size=run.training.batch_size,
            collate_fn=prepared.collate,
        )
    train = (*prepared.head, *arguments.pop("train", ()))
    return peftcore.apply(base, run.method.name, train=train, seed=run.training.seed, **arguments)


LOOKED_AT = 16
"""Batches for methods that look at data before training."""


def _trainer(
    run: Run, task: Task[Any], prepared: Prepared, injection: peftcore.Injection, callbacks: list[Any]
) -> AdapterTrainer:
    chosen = run.training
    between = chosen.evaluate_every or 0.1
    length = {"max_steps": chosen.steps} if chosen.steps else {"num_train_epochs": chosen.epochs or 3.0}
    arguments = transformers.TrainingArguments(
        output_dir=str(run.out / "checkpoints"),
        **length,
        per_device_train_batch_size=chosen.batch_size,
        per_device_eval_batch_size=chosen.batch_size,
        gradient_accumulation_steps=chosen.accumulate,
        learning_rate=chosen.learning_rate,
        lr_scheduler_type=chosen.schedule,
        warmup_steps=chosen.warmup,
        weight_decay=chosen.weight_decay,
        max_grad_norm=chosen.clip,
        bf16=chosen.autocast,
        activation_checkpointing=chosen.checkpoint_gradients,
        seed=chosen.seed,
        dataloader_num_workers=chosen.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=between,
        save_strategy="steps",
        save_steps=between,
        save_total_limit=KEPT,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{task.metric}",
        greater_is_better=task.greater,
        prediction_loss_only=prepared.metrics is None,
        logging_steps=between,
        logging_nan_inf_filter=False,
        use_cpu=not torch.accelerator.is_available(),  # or accelerate sees no processes beside this one
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    logs = TensorBoardCallback()  # type: ignore[no-untyped-call]
    logs.logging_dir = str(run.out / "logs")
    callbacks = [PeftcoreCallback(prepared.model), *callbacks, logs]
    if chosen.patience is not None:
        callbacks.append(transformers.EarlyStoppingCallback(chosen.patience))
    trainer = AdapterTrainer(
        injection,
        model=prepared.model,
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.held_out,
        data_collator=prepared.collate,
        compute_metrics=prepared.metrics,
        preprocess_logits_for_metrics=prepared.reduce,
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.model_accepts_loss_kwargs &= _divides_by_items(prepared, trainer.args.device)
    return trainer


def _divides_by_items(prepared: Prepared, device: torch.device) -> bool:
    """Whether the loss is a sum over what counts, divided by a number that the Trainer tells.

    The Trainer takes it from the signature, and multiplies by the number of processes, also where a model takes all
    keywords and looks at none.
    """
    batch = prepared.collate([prepared.train[0], prepared.train[1 % len(prepared.train)]])
    inputs = {name: value.to(device) for name, value in batch.items()}
    training = prepared.model.training
    prepared.model.eval()
    try:
        with torch.no_grad():
            one, two = (prepared.model(**inputs, num_items_in_batch=count)["loss"] for count in (1, 2))
    except TypeError:
        return False
    finally:
        prepared.model.train(training)
    return not torch.isclose(one, two, rtol=1e-3)


def _trained(trainer: AdapterTrainer, checkpoint: Path | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except OSError as error:
        raise TrainingError(f"training stopped: {error}; --resume goes on from the last whole checkpoint") from error


def _said(prepared: Prepared) -> list[str]:
    return prepared.samples() if prepared.samples is not None else []
