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
    """Options of the data: where the examples are."""

    train: str
    """A CSV, JSON, JSONL, Parquet or text file, a folder of pictures or of a saved dataset, or a name on the Hub."""
    held_out: str | None = None
    """Examples to score, from elsewhere; otherwise a split that the dataset has, or some of `train`."""
    held_out_size: PositiveInt | None = None
    """How many of `train` are held out (a fifth, at most 1,000)."""


class RowsOfTasks(Data):
    """Options of data whose rows may belong to several tasks, which one model learns together."""

    task_column: str | None = None
    """Column that says which task a row belongs to. Methods that ask for the task get it with each batch; scores are
    reported for each task too."""
    tasks: tuple[str, ...] = ()
    """Take only the rows of the named tasks."""

    def splits(self) -> Splits:
        """Read the examples of the tasks.

        Raises:
            BadInput: they cannot be read, or a task is without a row to train on.
        """
        found = splits(self.train, self.held_out, self.held_out_size)
        return of_tasks(found, self.task_column, self.tasks)

    def names(self, found: Splits) -> tuple[str, ...]:
        """Return the names of the tasks, none where no column says them."""
        return () if self.task_column is None else names_in(found.train, self.task_column)

    def told(self, rows: Sequence[dict[str, Any]], part: Any) -> list[dict[str, Any]]:
        """Return encoded rows, each with its task where a column says it."""
        return told(rows, part, self.task_column)

    def refuse(self, **others: object) -> None:
        """Refuse options that do not say which task they belong to.

        Raises:
            BadInput: one of them is set together with the column of tasks.
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
    """A Trainer that computes the loss, where the model of a task does not."""

    kind: type[transformers.Trainer]
    """The Trainer's class. The class that `peftcore train` adds to any Trainer is before it in the order of base
    classes. The attribute `injection`, which is None where the whole model trains, is there before its ``__init__``
    runs."""
    arguments: Callable[..., transformers.TrainingArguments] = transformers.TrainingArguments
    """Makes its training arguments from the arguments common to all tasks: their class, or a partial with more
    arguments."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the class."""


@dataclass(frozen=True)
class Work:
    """Slow work before training: drawing pictures, generating answers."""

    name: str
    """Name of the work, for the display."""
    steps: int
    do: Callable[[Callable[[], None]], None]
    """Does the work, and calls its argument after each step."""


@dataclass(frozen=True)
class CompanionAdapter:
    """An adapter of another part of the model, which trains together with the run's adapter."""

    name: str
    """The adapter's name, also the ending of its folder's name: ``adapter_NAME``."""
    part: nn.Module
    """The part of the model that gets the adapter."""
    method: str
    options: Mapping[str, Any]
    learning_rate: float | None = None
    """The highest learning rate; by default the run's."""
    until: float = 1.0
    """The share of all steps after which the adapter is frozen."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Files for other programs, which have it too: their names in the run's folder, and the formats."""

    def apply(self, seed: int) -> None:
        """Apply the adapter to its part."""
        peftcore.apply(self.part, self.method, name=self.name, seed=seed, **self.options)

    @property
    def injection(self) -> peftcore.Injection:
        """Return the adapter, once it is applied."""
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
    """Makes a batch of examples."""
    adapted: nn.Module | None = None
    """The part that gets the adapter; the model itself, unless set."""
    head: tuple[str, ...] = ()
    """Modules that are new, and train whole."""
    beside: tuple[CompanionAdapter, ...] = ()
    """Adapters of other parts that train together with the run's adapter; not in full fine-tuning."""
    reduce: Callable[[Any, Any], Any] | None = None
    """Reduces a batch's logits and labels to the inputs of the metrics: logits of all examples would not fit in
    memory."""
    metrics: Callable[[Any], dict[str, float]] | None = None
    """Computes the metrics from the (reduced) outputs of all examples; the loss is there without it."""
    floor: float | None = None
    """The metric of a constant answer, such as the most frequent class, if it is known."""
    tasks: tuple[str, ...] = ()
    """The tasks of the rows, where data names them: each row then has the name of its task under `several.TASK`."""
    check: Callable[[peftcore.Injection | None], None] | None = None
    """Refuses problems that only the adapted model shows; called before training."""
    first: Work | None = None
    """Work with the model that is done before any adapter is installed."""
    samples: Callable[[], list[str]] | None = None
    """Returns answers of the model, to be looked at before training and after it."""
    during: bool = False
    """Whether samples are wanted at each score too."""
    picture: Path | None = None
    """A file that shows all samples so far, where these are pictures."""
    trainer: OwnTrainer | None = None
    """The Trainer, where it is another one than transformers'."""

    def check_method(self, name: str) -> None:
        """Refuse full fine-tuning where further adapters train together with the method's.

        Raises:
            BadInput: there are some.
        """
        if name == FULL and self.beside:
            beside = ", ".join(each.name for each in self.beside)
            raise BadInput(
                f"{name} fine-tuning trains no adapter, but the task also trains one of {beside}: choose another method"
            )


class Task(ABC, Generic[D]):
    """One kind of task. Plugins name theirs in the hook `peftcore_tasks`."""

    Data: ClassVar[type[Data]]
    """The options of its data."""
    packages: ClassVar[Mapping[str, str]] = {}
    """Packages that have to be installed beyond the command line: modules, and how pip calls them."""
    metric: ClassVar[str] = "loss"
    """The number by which runs are compared; it says which checkpoint is best, unless `coarse`."""
    greater: ClassVar[bool] = False
    """Whether a higher metric is better."""
    coarse: ClassVar[bool] = False
    """Whether many checkpoints have the same score, so that the one of the lowest loss is the best."""
    use: ClassVar[Use | None] = None
    """The use for which `check_model` checks the model's name, where a task takes every kind of MODEL; else None."""

    def check_model(self, model: str) -> None:
        """Refuse a model by its name alone, before anything is read or written.

        Raises:
            BadInput: there is nothing of that name, or nothing that the task can use.
        """
        if self.use is not None:
            find(model).check(self.use)

    @abstractmethod
    def prepare(self, run: Run, data: D) -> Prepared:
        """Read the examples, then load the model.

        Raises:
            BadInput: one of them cannot be used.
        """
