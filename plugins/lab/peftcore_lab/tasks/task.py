"""The interface of a task: options for its data, and a model with examples, ready for transformers' ``Trainer``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import transformers
from pydantic import PositiveInt
from torch import nn

import peftcore
from peftcore.errors import BadInput
from peftcore.forward.state.own_losses import IGNORED
from peftcore.models.model_names import Use, find
from peftcore_lab.data.example_sources import Splits, splits
from peftcore_lab.data.task_mixtures import names_in, of_tasks, told
from peftcore_lab.runs.run import FULL, Options, Run

__all__ = ["IGNORED", "CompanionAdapter", "Data", "OwnTrainer", "Prepared", "RowsOfTasks", "Task", "Work"]


class Data(Options):
    """Options of the data: the sources of the examples."""

    train: str
    """A CSV, JSON, JSONL, Parquet or text file, a folder of pictures or of a saved dataset, or a name on the Hub."""
    held_out: str | None = None
    """A separate source of validation examples. By default they are a split of the dataset, or a part of `train`."""
    held_out_size: PositiveInt | None = None
    """The number of examples of `train` that are held out for validation (by default a fifth, at most 1,000)."""


class RowsOfTasks(Data):
    """Options of data whose rows may belong to several tasks, which one model learns together."""

    task_column: str | None = None
    """Column with the task of each row. Methods that need the task get it with each batch. Scores are also reported for
    each task."""
    tasks: tuple[str, ...] = ()
    """The tasks whose rows are used; by default all."""

    def splits(self) -> Splits:
        """Read the examples of the tasks.

        Raises:
            BadInput: the examples cannot be read, or a task lacks training rows.
        """
        found = splits(self.train, self.held_out, self.held_out_size)
        return of_tasks(found, self.task_column, self.tasks)

    def names(self, found: Splits) -> tuple[str, ...]:
        """Return the names of the tasks; empty without a column of tasks."""
        return () if self.task_column is None else names_in(found.train, self.task_column)

    def told(self, rows: Sequence[dict[str, Any]], part: Any) -> list[dict[str, Any]]:
        """Return encoded rows. If there is a column of tasks, each row also has its task."""
        return told(rows, part, self.task_column)

    def refuse(self, **others: object) -> None:
        """Check that options without a task are not combined with a column of tasks.

        Raises:
            BadInput: one of these options is set together with a column of tasks.
        """
        for name, value in others.items():
            if value and self.task_column is not None:
                raise BadInput(
                    f"data.{name} does not work with data.task_column, because it does not name a task: remove one of "
                    "the two"
                )


D = TypeVar("D", bound=Data)


@dataclass(frozen=True)
class OwnTrainer:
    """The Trainer class of a task whose model does not compute the loss itself."""

    kind: type[transformers.Trainer]
    """The class of the Trainer. `peftcore train` makes a subclass of `AdapterTrainer` and this class, in this order.
    The attribute `injection` is set before ``__init__`` of this class runs; it is None in full fine-tuning."""
    arguments: Callable[..., transformers.TrainingArguments] = transformers.TrainingArguments
    """Creates the training arguments from the arguments that all tasks share. It is the class of the training
    arguments, or a partial with further arguments."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments for the class of the Trainer."""


@dataclass(frozen=True)
class Work:
    """Slow work before training, such as generating pictures."""

    name: str
    """Name of the work, which is displayed."""
    steps: int
    do: Callable[[Callable[[], None]], None]
    """The function that does the work. It calls its argument after each step."""


@dataclass(frozen=True)
class CompanionAdapter:
    """An adapter of another part of the model, which trains together with the run's adapter."""

    name: str
    """The adapter's name. Its folder is named ``adapter_NAME``."""
    part: nn.Module
    """The part of the model that gets the adapter."""
    method: str
    options: Mapping[str, Any]
    learning_rate: float | None = None
    """The highest learning rate; by default that of the run."""
    until: float = 1.0
    """The share of all steps after which the adapter is frozen."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Additional files of the adapter for other programs: the format of each file, by its name in the run's folder."""

    def apply(self, seed: int) -> None:
        """Apply the adapter to its part of the model."""
        peftcore.apply(self.part, self.method, name=self.name, seed=seed, **self.options)

    @property
    def injection(self) -> peftcore.Injection:
        """Return the adapter after it was applied."""
        return peftcore.injections(self.part)[self.name]


@dataclass
class Prepared:
    """A model and its examples."""

    model: nn.Module
    """The model for the Trainer: called with a batch, it returns a loss, unless the task has a `trainer`."""
    train: Any
    held_out: Any
    """Indexable examples."""
    collate: Callable[[list[Any]], dict[str, Any]]
    """Collates examples to a batch."""
    adapted: nn.Module | None = None
    """The part of the model that gets the adapter; None: the whole model."""
    head: tuple[str, ...] = ()
    """Newly initialized modules, which train as a whole."""
    beside: tuple[CompanionAdapter, ...] = ()
    """Adapters of other parts that train together with the run's adapter; not in full fine-tuning."""
    reduce: Callable[[Any, Any], Any] | None = None
    """Reduces the logits and labels of a batch to the inputs of the metrics, since the logits of all examples would not
    fit in memory."""
    metrics: Callable[[Any], dict[str, float]] | None = None
    """Computes the metrics from the (reduced) outputs of all examples. The loss is always computed."""
    floor: float | None = None
    """The metric of a constant answer, such as the most frequent class, if it is known."""
    tasks: tuple[str, ...] = ()
    """The tasks of the rows, if the data names them. Each row then has the name of its task under `several.TASK`."""
    check: Callable[[peftcore.Injection | None], None] | None = None
    """A check of the adapted model, which is called before training and raises errors."""
    first: Work | None = None
    """Work with the model that is done before any adapter is installed."""
    samples: Callable[[], list[str]] | None = None
    """Returns sample answers of the model, which are shown before and after training."""
    during: bool = False
    """Whether samples are also generated at each evaluation."""
    picture: Path | None = None
    """A file that shows all samples so far, if samples are pictures."""
    trainer: OwnTrainer | None = None
    """The Trainer of the task, if it is not the Trainer of transformers."""

    def check_method(self, name: str) -> None:
        """Check that a method can train with this task. Full fine-tuning cannot, if adapters of other parts train
        together with the run's adapter.

        Raises:
            BadInput: the method is full fine-tuning, and there are such adapters.
        """
        if name == FULL and self.beside:
            beside = ", ".join(each.name for each in self.beside)
            raise BadInput(
                f"{name} fine-tuning trains no adapter, but the task also trains one of {beside}: choose another method"
            )


class Task(ABC, Generic[D]):
    """One kind of task. Plugins register their tasks in the hook `peftcore_tasks`."""

    Data: ClassVar[type[Data]]
    """The class of the options of the task's data."""
    packages: ClassVar[Mapping[str, str]] = {}
    """Additional packages that must be installed: the names for pip, by the names of modules."""
    metric: ClassVar[str] = "loss"
    """The metric by which runs are compared. It also determines the best checkpoint, unless `coarse` is True."""
    greater: ClassVar[bool] = False
    """Whether a higher metric is better."""
    coarse: ClassVar[bool] = False
    """Whether many checkpoints have the same score. Then the best checkpoint is the one with the lowest loss."""
    use: ClassVar[Use | None] = None
    """The use for which `check_model` checks the model's name; None if the model is not checked."""

    def check_model(self, model: str) -> None:
        """Check by its name that a model can be used, before anything is read or written.

        Raises:
            BadInput: the model does not exist, or the task cannot use it.
        """
        if self.use is not None:
            find(model).check(self.use)

    @abstractmethod
    def prepare(self, run: Run, data: D) -> Prepared:
        """Read the examples, load the model, and return both.

        Raises:
            BadInput: the examples or the model cannot be used.
        """
