"""The subclass of the ``Trainer`` of transformers that ``peftcore train`` uses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.integrations.integration_utils import TensorBoardCallback

import peftcore
from peftcore.errors import BadInput, TrainingError
from peftcore.layers.fsdp import gathered, loading_whole
from peftcore.training import PeftcoreTrainer
from peftcore.training.optimizer import cut_state, whole_state
from peftcore_lab.runs.run import Run
from peftcore_lab.tasks.task import CompanionAdapter, Prepared, Task
from peftcore_lab.training.averages import Averages
from peftcore_lab.training.processes import (
    ask_for_sharding,
    is_sharded_run,
    settle_sharding,
    sharding_arguments,
)
from peftcore_lab.training.task_rows import collate, metrics, told

TENSORBOARD = "tensorboard"
KEPT = 3
"""Number of checkpoints that are kept: the best, the last, and the one before it while the next one is written."""


class AdapterTrainer(PeftcoreTrainer):
    """The Trainer for adapters. It uses the method's optimizer, and raises TrainingError if the loss is not finite."""

    def __init__(self, injection: peftcore.Injection | None, **kwargs: Any) -> None:
        self.injection = injection  # a task's own Trainer may compute with it as it begins
        self._beside: tuple[CompanionAdapter, ...] = kwargs.pop("beside", ())
        decay = kwargs.pop("ema", None)
        super().__init__(**kwargs)
        settle_sharding(self.accelerator, self._host)
        # accelerate shards. Checkpoints are those of one process, for its own hold all of the base and not all that a
        # method's optimizer remembers.
        self.is_fsdp_enabled = False
        self.averages = None if decay is None else Averages([*dict.fromkeys(self._trained())], decay)
        if self.averages is not None:
            self.add_callback(Steps(self.averages))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.injection is not None:
            self.optimizer = self._optimizer_of(self.injection, None)
            for each in self._beside:
                for group in self._optimizer_of(each.injection, each.learning_rate).param_groups:
                    self.optimizer.add_param_group(group)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def _optimizer_of(self, injection: peftcore.Injection, rate: float | None) -> torch.optim.Optimizer:
        return injection.optimizer(
            torch.optim.AdamW, lr=rate or self.args.learning_rate, weight_decay=self.args.weight_decay
        )

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with told(self._host, inputs) as batch:
            return super().compute_loss(model, batch, *args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        ask_for_sharding(self.args)
        super().create_accelerator_and_postprocess()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with nullcontext() if self.averages is None else self.averages.used():
            scores: dict[str, float] = super().evaluate(*args, **kwargs)
        return scores

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        assert self.optimizer is not None
        with self.whole(), whole_state(self.optimizer):
            super()._save_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.averages is not None and self.args.should_save:
            self.averages.save(Path(output_dir))

    def _load_best_model(self) -> None:
        with loading_whole(self._host):
            super()._load_best_model()
        if self.averages is not None:
            self.averages.load(Path(str(self.state.best_model_checkpoint)))

    def take(self, checkpoint: Path) -> None:
        """Load the result of a finished run: the best checkpoint if the run's options ask for it, otherwise the given
        checkpoint."""
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
            return
        with loading_whole(self._host):
            self._load_from_checkpoint(str(checkpoint))
        if self.averages is not None:
            self.averages.load(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        assert self.optimizer is not None
        cut_state(self.optimizer)
        if self.averages is not None and checkpoint is not None:
            self.averages.load(Path(checkpoint))

    @property
    def _host(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def whole(self) -> AbstractContextManager[None]:
        """Return a context manager in which all trained parameters are gathered from all processes."""
        return gathered(self._host, self._trained)

    def _trained(self) -> Iterator[nn.Parameter]:
        yield from (parameter for parameter in self._host.parameters() if parameter.requires_grad)
        if self.injection is not None:
            yield from self.injection.parameters()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            raise TrainingError(
                f"the loss became {loss.mean().item()} in step {self.state.global_step + 1}: try a smaller learning "
                "rate or a longer warm-up; the last checkpoint is of an earlier step"
            )
        for each in self._beside:
            if self.state.global_step >= each.until * self.state.max_steps:
                for parameter in each.injection.parameters():
                    parameter.grad = None  # so that it neither moves nor counts in the norm of all gradients
        return loss


class Steps(transformers.TrainerCallback):
    """A callback that updates the moving averages after each step."""

    def __init__(self, averages: Averages) -> None:
        self._averages = averages

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._averages.step()


class LastStep(transformers.TrainerCallback):
    """A callback that evaluates the model after the last step, even if it is not a regular evaluation step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_log = True


class Patience(transformers.EarlyStoppingCallback):
    """Early stopping whose counter continues from the checkpoint if the training is resumed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        held = state.stateful_callbacks.get(type(self).__name__, self.state())
        self.early_stopping_patience_counter = held["attributes"]["early_stopping_patience_counter"]


class Clock(transformers.TrainerCallback):
    """A callback that measures the time of optimizer steps, without the time between them."""

    def __init__(self) -> None:
        self._seconds, self._steps, self._began = 0.0, 0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._began
        self._steps += 1

    @property
    def seconds_per_step(self) -> float:
        """Return the mean time of a step."""
        return self._seconds / max(self._steps, 1)


def trainer_for(
    run: Run, task: Task[Any], prepared: Prepared, injection: peftcore.Injection | None, callbacks: list[Any]
) -> AdapterTrainer:
    """Return a Trainer for the adapter, or for the whole model in full fine-tuning.

    Raises:
        BadInput: the Trainer does not support sharding together with the task or with averages.
    """
    own = prepared.trainer
    if own is not None and is_sharded_run(run.training.shard):
        raise BadInput(
            f"the task {run.task} uses its own Trainer, which does not support sharding: remove training.shard and "
            "accelerate's --use_fsdp, so that every process holds the whole model"
        )
    if run.training.ema is not None and is_sharded_run(run.training.shard):
        raise BadInput("training.ema does not support sharded weights: remove training.ema, or train without sharding")
    wanted = run.training.report_to
    logs = [_tensorboard(run)] if TENSORBOARD in wanted else []
    patience = run.training.patience
    early = [] if patience is None else [Patience(patience)]
    kind = AdapterTrainer if own is None else _before(own.kind)
    trainer = kind(
        injection,
        model=prepared.model,
        args=_arguments(run, task, prepared),
        train_dataset=prepared.train,
        eval_dataset=prepared.held_out,
        data_collator=collate(prepared),
        compute_metrics=metrics(prepared),
        callbacks=[LastStep(), *callbacks, *logs, *early],
        ema=run.training.ema,
        beside=prepared.beside,
        **({} if own is None else own.options),
    )
    trainer.preprocess_logits_for_metrics = prepared.reduce  # not all Trainers have an argument for it
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.model_accepts_loss_kwargs &= own is None and _divides_by_items(prepared)
    return trainer


def _before(kind: type[transformers.Trainer]) -> type[AdapterTrainer]:
    """Return a subclass of `AdapterTrainer` and of another Trainer class, in this order."""
    return type(f"Adapter{kind.__name__}", (AdapterTrainer, kind), {})


def _tensorboard(run: Run) -> TensorBoardCallback:
    logs = TensorBoardCallback()  # type: ignore[no-untyped-call]
    logs.logging_dir = str(run.out / "logs")
    return logs


def _arguments(run: Run, task: Task[Any], prepared: Prepared) -> transformers.TrainingArguments:
    chosen = run.training
    length = {"max_steps": chosen.steps} if chosen.steps else {"num_train_epochs": chosen.epochs or 3.0}
    make = transformers.TrainingArguments if prepared.trainer is None else prepared.trainer.arguments
    return make(
        output_dir=str(run.out / "checkpoints"),
        **length,
        per_device_train_batch_size=chosen.batch_size,
        per_device_eval_batch_size=2 * chosen.batch_size,
        gradient_accumulation_steps=chosen.accumulate,
        train_sampling_strategy="group_by_length" if chosen.group_by_length else "random",
        learning_rate=chosen.learning_rate,
        lr_scheduler_type=chosen.schedule,
        warmup_steps=chosen.warmup,
        weight_decay=chosen.weight_decay,
        max_grad_norm=chosen.clip,
        bf16=chosen.autocast,
        **_checkpointing(chosen.checkpoint_gradients),
        **sharding_arguments(chosen.shard),
        seed=chosen.seed,
        dataloader_num_workers=chosen.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=chosen.evaluate_every,
        save_strategy="steps" if chosen.checkpoints else "no",
        save_steps=chosen.evaluate_every,
        save_total_limit=KEPT,
        load_best_model_at_end=chosen.checkpoints is True,
        metric_for_best_model="eval_loss" if task.coarse else f"eval_{task.metric}",
        greater_is_better=task.greater and not task.coarse,
        prediction_loss_only=prepared.metrics is None,
        logging_steps=chosen.evaluate_every,
        logging_nan_inf_filter=False,
        use_cpu=not torch.accelerator.is_available(),  # or accelerate sees no processes beside this one
        report_to=[name for name in chosen.report_to if name != TENSORBOARD] or "none",
        run_name=run.out.name,
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Return the arguments for gradient checkpointing, which have other names since transformers 5.23."""
    if any(each.name == "activation_checkpointing" for each in fields(transformers.TrainingArguments)):
        return {"activation_checkpointing": wanted}
    return {"gradient_checkpointing": wanted, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def _divides_by_items(prepared: Prepared) -> bool:
    """Return whether the model's loss is a sum over items, divided by the number of items that the Trainer passes.

    The Trainer decides this from the signature of the model's forward. This is wrong for models that accept all keyword
    arguments and ignore this one, so here two losses are compared.
    """
    batch = collate(prepared)([prepared.train[0], prepared.train[1 % len(prepared.train)]])
    device = next(prepared.model.parameters()).device  # that of the processes only once it is sharded
    training = prepared.model.training
    prepared.model.eval()
    try:
        with torch.no_grad(), told(prepared.model, batch) as rest:
            inputs = {name: each.to(device) if torch.is_tensor(each) else each for name, each in rest.items()}
            one, two = (prepared.model(**inputs, num_items_in_batch=count)["loss"] for count in (1, 2))
    except TypeError:
        return False
    finally:
        prepared.model.train(training)
    return not torch.isclose(one, two, rtol=1e-3)
