"""Data with several tasks: methods get the task of each row, and scores are reported for each task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import transformers
from datasets import Dataset
from torch import nn

import peftcore
from peftcore.author import MethodConfig
from peftcore_lab.data.task_mixtures import TASK
from peftcore_lab.runs.run import MethodChoice
from peftcore_lab.tasks.task import Prepared

Batch = dict[str, Any]


def options_for(choice: MethodChoice, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a method. If the data has tasks and the method depends on them, the arguments include the
    names of the tasks.

    Raises:
        ConfigError: the method's options name other tasks, or only the number of tasks.
    """
    return peftcore.method(choice.name).Config.for_tasks(choice.arguments, tasks) if tasks else choice.arguments


def check_known(config: MethodConfig, prepared: Prepared) -> None:
    """Check that an adapter was made for the tasks of the data.

    Raises:
        ConfigError: the adapter was made for other tasks.
    """
    if prepared.tasks:
        type(config).for_tasks(config.model_dump(), prepared.tasks)


def collate(prepared: Prepared) -> Callable[[list[Any]], Batch]:
    """Return the collate function. If rows belong to tasks, it adds the names of the tasks to the batch."""

    def together(rows: list[Any]) -> Batch:
        rest = [{name: value for name, value in row.items() if name != TASK} for row in rows]
        return {**prepared.collate(rest), TASK: [str(row[TASK]) for row in rows]}

    return together if prepared.tasks else prepared.collate


def without_names(prepared: Prepared) -> Callable[[list[Any]], Batch]:
    """Return a collate function without the names of tasks, whose batches can be passed to the model."""
    make = collate(prepared)
    return lambda rows: {name: value for name, value in make(rows).items() if name != TASK}


@contextmanager
def told(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[Batch]:
    """Context manager in which methods get the task of each row. Its value is the batch without the names of tasks."""
    rest = {name: value for name, value in batch.items() if name != TASK}
    if TASK not in batch:
        yield rest
        return
    with peftcore.call(model, task=batch[TASK]):
        yield rest


def metrics(prepared: Prepared) -> Callable[[transformers.EvalPrediction], dict[str, float]] | None:
    """Return a function that computes the metrics over all rows, followed by the metrics over the rows of each task,
    such as ``accuracy/jokes``."""
    whole = prepared.metrics
    if whole is None or not prepared.tasks:
        return whole
    names = np.array(_names(prepared.held_out))

    def scored(found: transformers.EvalPrediction) -> dict[str, float]:
        scores = {**whole(found)}
        for task in prepared.tasks:
            if (own := names == task).any():
                part = transformers.EvalPrediction(found.predictions[own], found.label_ids[own])
                scores |= {f"{name}/{task}": value for name, value in whole(part).items()}
        return scores

    return scored


def _names(rows: Any) -> Sequence[str]:
    found = rows[TASK] if isinstance(rows, Dataset) else [row[TASK] for row in rows]  # no picture is opened for it
    return [str(name) for name in found]
