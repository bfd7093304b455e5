"""The check that a method learns a small real task. The task is defined by the kit, not by the author of the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.contract.batches import Labelled
from peftcore.contract.method import LearningRate
from peftcore.errors import TargetError, UnsupportedSite
from peftcore.injection.injection import Injection
from peftcore.testing.kit import Case, NotApplicable, check
from peftcore.testing.learning_tasks import PICTURE, STEPS, TASKS, Batch, LearningTask, full_fine_tuning

SHARE = 1 / 3
"""The share of the score gain of full fine-tuning that a method has to reach in the same number of steps."""
MULTIPLES = (30, 100, 10, 300, 3, 1)
"""Factors by which the method's own learning rate is multiplied, in the order in which they are tried. They are needed
because the hosts of the tasks are about thirty times narrower than the models of papers, and are trained for 80 steps
instead of thousands."""
UNKNOWN = LearningRate(1e-3, source="", on="")
"""The learning rate for methods without `Method.learning_rate`."""


def _told(case: Case, task: LearningTask) -> LearningTask:
    """Return a copy of the task in which all calls of the model pass the arguments of ``peftcore.call`` that the method
    needs."""
    context = case.context
    if context is None:
        return task

    def telling(run: Callable[[nn.Module, Batch], Any]) -> Callable[[nn.Module, Batch], Any]:
        def told(model: nn.Module, batch: Batch) -> Any:
            with peftcore.call(model, **context(model, batch[PICTURE])):
                return run(model, batch)

        return told

    return replace(task, loss=telling(task.loss), score=telling(task.score))


def _adapted(case: Case, task: LearningTask) -> Injection:
    """Apply the method with its default target to a fresh host of the task."""
    return peftcore.apply(
        task.pretrained(), case.method, data=_shown(task) if case.looks_at_data else None, **case.options
    )


def _shown(task: LearningTask) -> list[Any]:
    """Return one batch of the task as the argument ``data`` of `apply`, with labels if the task has labels."""
    batch = task.batch(STEPS)

    def loss(model: nn.Module) -> Tensor:
        return task.loss(model, batch)

    return [Labelled(loss, batch["labels"])] if "labels" in batch else [loss]


def _gains(case: Case, task: LearningTask) -> Iterator[tuple[float, float]]:
    """Yield, for each multiple of the learning rate, two shares of the gain of full fine-tuning: the share that the
    method reaches before training, and the share after training."""
    base = task.scored(task.pretrained())
    whole = full_fine_tuning(task) - base
    task = _told(case, task)
    rate = case.method.learning_rate or UNKNOWN
    for multiple in MULTIPLES:
        injection = _adapted(case, task)
        model = injection.model
        before = task.scored(model)
        options = {"momentum": rate.momentum} if rate.momentum else {}
        optimizer = injection.optimizer(
            getattr(torch.optim, rate.optimizer),
            lr=multiple * rate.rate,
            weight_decay=0.0,
            total_steps=STEPS,
            **options,
        )
        gained = 0.0
        for first in range(0, STEPS, STEPS // 2):  # what was gained in half the steps was gained
            task.learn(model, optimizer, first, STEPS // 2)
            gained = (task.scored(model) - base) / whole
            if gained >= SHARE:
                break
        yield (before - base) / whole, gained


@check(
    "on a small real task it gains a third of what full fine-tuning gains in the same steps, at a multiple of the "
    "learning rate that its source names",
    cause="the update is scaled far too small, the optimizer does not get what should train, or `learning_rate` is "
    "another method's",
    remedy="print gradients and values after some steps; tensors that want other rates get them in `parameter_groups`",
    chooses=True,
    cost="slow",
)
def it_learns(case: Case) -> None:
    tried: dict[str, list[str]] = {}
    for task in TASKS:
        if case.context is not None and PICTURE not in task.batch(0):
            continue
        try:
            _adapted(case, task)
        except (TargetError, UnsupportedSite):
            continue
        for frozen, gained in _gains(case, task):
            case.expect(frozen < SHARE, f"{task.name}: untrained it gains {frozen:.0%}, so nothing would be learned")
            if gained >= SHARE:
                return
            tried.setdefault(task.name, []).append(f"{gained:.0%}")
    if not tried:
        raise NotApplicable("no task has a host in which the method has a place")
    gains = "; ".join(f"{name} {' '.join(each)}" for name, each in tried.items())
    case.expect(False, f"gains by task and learning rate: {gains}")
