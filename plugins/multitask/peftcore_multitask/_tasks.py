"""The task of each row of a batch, which ``peftcore.call(model, task=...)`` passes. Two options of a method set the
known tasks and the default task."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from peftcore.author import MethodConfig, Site, forward_context
from peftcore.errors import ConfigError, MissingContext, RouteError


class TaskConfig(MethodConfig):
    """Options of a method that depends on the task."""

    tasks: PositiveInt | list[str] = 1
    """The number of tasks, or their names."""
    task: NonNegativeInt | str | None = None
    """The default task, for calls that do not pass one. Without a default, each call must pass a task unless there is
    only one."""

    @classmethod
    def for_tasks(cls, options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        known = options.get("tasks")
        if known is None:
            return {**options, "tasks": [*names]}
        if isinstance(known, int):
            raise ConfigError(
                f"tasks={known} has no names, but the data has: {', '.join(names)}; set tasks to these names, or "
                "remove the option"
            )
        for name in names:
            position(name, known)
        return dict(options)

    @model_validator(mode="after")
    def _known(self) -> Self:
        if isinstance(self.tasks, list) and (not self.tasks or len(set(self.tasks)) < len(self.tasks)):
            raise ValueError("tasks must be a number, or a list of different names")
        if self.task is not None:
            position(self.task, self.tasks)
        return self


def task_count(config: TaskConfig) -> int:
    """Return how many tasks there are."""
    return config.tasks if isinstance(config.tasks, int) else len(config.tasks)


def position(task: Any, tasks: int | list[str]) -> int:
    """Return the index of a task, which is given by name or index.

    Raises:
        ConfigError: the task is unknown.
    """
    if isinstance(task, str):
        if isinstance(tasks, list) and task in tasks:
            return tasks.index(task)
        known = ", ".join(tasks) if isinstance(tasks, list) else f"none has a name; they are 0 to {tasks - 1}"
        raise ConfigError(f"there is no task {task!r}: {known}")
    index, count = operator.index(task), tasks if isinstance(tasks, int) else len(tasks)
    if not 0 <= index < count:
        raise ConfigError(f"task {index} is not one of 0 to {count - 1}")
    return index


class Tasks:
    """Looks up the entry of a table for the task of each row.

    A call passes one task for all rows, as a number or a name. Or it passes a list or an integer tensor, with one task
    for each row or a single task for all rows. Rows are the first dimension of a module's inputs.
    """

    def __init__(self, site: Site, config: TaskConfig) -> None:
        self.tasks, self.default, self.path = config.tasks, config.task, site.path
        self.apart = not site.mixes_rows
        if self.default is None and task_count(config) == 1:
            self.default = 0

    def of_rows(self, table: Tensor, rows: int) -> Tensor:
        """Return the entries of `table` ``[tasks, ...]`` for the tasks of a module's input rows. The result is ``[1,
        ...]`` if the call passes one task, else ``[rows, ...]``. Entries are repeated if the module gets several rows
        for each row of the batch (beams, windows, flat tokens).

        Raises:
            MissingContext: the call does not pass the task.
            RouteError: the number of rows does not fit the number of tasks.
        """
        running = forward_context()
        told = running.told("task", self.default)
        if told is None:
            raise MissingContext(
                "this method needs the task, one name or a list of one for each row: use `with peftcore.call(model, "
                "task=...):`, or set the option task as a default"
            )
        if isinstance(told, Tensor) and told.dim():
            index = self._checked(told).to(table.device)
        elif isinstance(told, list | tuple):
            index = torch.tensor([position(each, self.tasks) for each in told], device=table.device)
        else:
            one = position(told, self.tasks)
            return table[one : one + 1]
        if not self.apart:
            raise RouteError(
                f"{self.path} got {rows} rows, which cannot be assigned to {len(index)} tasks; pass one task for all "
                "rows"
            )
        index = running.for_rows("task", rows, index)
        return table[index if len(index) in (1, rows) else index.repeat_interleave(rows // len(index))]

    def _checked(self, told: Tensor) -> Tensor:
        if told.dim() != 1 or told.is_floating_point() or told.dtype == torch.bool:
            raise ConfigError(
                f"task={told.dtype} {tuple(told.shape)}: pass a list of tasks or a vector of integers, one for each row"
            )
        if told.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look would cost a wait
            for each in told.tolist():
                position(each, self.tasks)
        return told.long()
