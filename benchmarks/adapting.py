"""Adapts a small model by each of many methods, all in one and the same way, and keeps what was found.

Every method has the same rates to choose from: it trains once with each, with the first seed, and takes the one with
the least loss on examples that neither train nor are in a table. That run is its first; the other seeds follow at that
rate. Seeds draw what a method starts from and the order of examples; the pretrained model is the same one. Options are
a method's defaults. Time is the process's own, so that others on the machine do not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import peftcore
from peftcore.errors import PeftcoreError, TrainingError

RATES = (0.001, 0.004, 0.015, 0.06)
SEEDS = (0, 1, 2)
FULL, UNADAPTED = "full", "unadapted"
"""The names of full fine-tuning and of the model as it is, which are no methods."""
DIVERGED = (TrainingError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""What a training may end in at a rate at which values grow beyond all bounds."""
ROOT = Path(__file__).parents[1]


class Task(ABC):
    """A pretrained model, and what it is to learn.

    Attributes:
        steps: how many a training has.
    """

    steps: int

    @abstractmethod
    def host(self) -> nn.Module:
        """Return a copy of the pretrained model."""

    @abstractmethod
    def options(self, method: str) -> dict[str, Any]:
        """Return with which options a method is applied."""

    @abstractmethod
    def loss(self, model: nn.Module) -> torch.Tensor:
        """Return the loss of a batch that torch's generator draws, of shape []."""

    @abstractmethod
    def validate(self, model: nn.Module) -> float:
        """Return the loss on examples that choose the rate."""

    @abstractmethod
    def score(self, model: nn.Module, injection: peftcore.Injection | None) -> dict[str, float]:
        """Return what the table says of an adapted model; it may be taken apart."""


@dataclass(frozen=True)
class Row:
    """What was found of one method: numbers of each seed."""

    method: str
    trainable: int
    rate: float
    seconds: list[float]
    scores: dict[str, list[float]]

    def cell(self, score: str) -> str:
        """Return mean and standard deviation over seeds."""
        return spread(self.scores[score])

    @property
    def called(self) -> str:
        """The method as tables have it."""
        return {FULL: "full fine-tuning", UNADAPTED: "as it is"}.get(self.method, f"`{self.method}`")

    def mean(self, score: str) -> float:
        return statistics.mean(self.scores[score])


@dataclass(frozen=True)
class Adapted:
    """A trained model."""

    model: nn.Module
    injection: peftcore.Injection | None
    trainable: int
    seconds: float


def adapt(task: Task, method: str, rate: float, seed: int) -> Adapted:
    """Train a copy of the pretrained model with a method, or all of it.

    Raises:
        PeftcoreError: the method does not act on this model, or its training came to no end.
    """
    model, injection = task.host(), None
    torch.manual_seed(seed)
    if method == FULL:
        learned = [*model.requires_grad_(True).parameters()]
        optimizer: Optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    else:
        injection = peftcore.apply(model, method, seed=seed, **task.options(method))
        learned = [each for each in injection.parameters() if each.requires_grad]
        optimizer = injection.optimizer(torch.optim.AdamW, lr=rate, weight_decay=0.0, total_steps=task.steps)
    torch.manual_seed(seed)
    begun = time.process_time()
    train(task, model, injection, optimizer)
    return Adapted(model, injection, sum(each.numel() for each in learned), time.process_time() - begun)


def train(task: Task, model: nn.Module, injection: peftcore.Injection | None, optimizer: Optimizer) -> None:
    """All steps, the second half of them at a rate that falls to nothing; leaves the model in evaluation."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / task.steps)))
    model.train()
    for _ in range(task.steps):
        optimizer.zero_grad()
        loss = task.loss(model)
        if injection is not None:
            loss = loss + injection.losses()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    model.eval()


def measure(task: Task, method: str, tick: Callable[[], None], rates: Sequence[float] = RATES) -> Row:
    """Choose a rate, train with all seeds, and score.

    Raises:
        PeftcoreError: the method does not act on this model, or no training came to an end.
    """
    tried: dict[float, Adapted] = {}
    losses: dict[float, float] = {}
    for rate in rates:
        with suppress(*DIVERGED):
            tried[rate] = adapt(task, method, rate, SEEDS[0])
            losses[rate] = task.validate(tried[rate].model)
        tick()
    finite = [rate for rate, loss in losses.items() if math.isfinite(loss)]
    if not finite:
        raise TrainingError(f"{method} came to no finite loss at any of the rates {', '.join(map(str, rates))}")
    rate = min(finite, key=losses.__getitem__)
    runs = [tried[rate]]
    for seed in SEEDS[1:]:
        runs.append(adapt(task, method, rate, seed))
        tick()
    scores = [task.score(run.model, run.injection) for run in runs]
    return Row(
        method=method,
        trainable=runs[0].trainable,
        rate=rate,
        seconds=[run.seconds for run in runs],
        scores={name: [each[name] for each in scores] for name in scores[0]},
    )


def candidates(task: Task, methods: Iterable[str]) -> tuple[list[str], dict[str, PeftcoreError]]:
    """Return the methods that act on a task's model, and why the others do not."""
    there: list[str] = []
    refused: dict[str, PeftcoreError] = {}
    for method in methods:
        try:
            model = task.host()
            injection = peftcore.apply(model, method, **task.options(method))
            torch.autograd.backward(task.loss(model) + injection.losses())
            there.append(method)
        except PeftcoreError as error:
            refused[method] = error
    return there, refused


def reasons(refused: Mapping[str, PeftcoreError]) -> dict[str, str]:
    """Return what errors say before they say what to do."""
    return {method: str(error).split(";")[0].split(". ")[0].strip().rstrip(".") for method, error in refused.items()}


def of_category(category: str, beside: Iterable[str]) -> list[str]:
    """Return all methods of a category that are installed, and others to see them beside."""
    own = [info.name for info in peftcore.methods(category)]
    return [*(name for name in beside if name not in own), *own]


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation as tables have them; a number alone has none."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> list[str]:
    """Return the lines of a table of Markdown.

    Args:
        rows: in their order.
        columns: score -> what its column is called.
    """
    heads = ["method", *columns.values(), "trainable", "seconds", "rate"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        cells = [row.called, *(row.cell(name) for name in columns)]
        cost = [f"{row.trainable:,}", f"{statistics.mean(row.seconds):.1f}", f"{row.rate:g}"]
        cells += cost if row.trainable else ["0", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def not_there(refused: Mapping[str, str]) -> list[str]:
    """Return a sentence about methods that do not act on a model."""
    if not refused:
        return []
    said = (f"`{name}` ({why})".replace("*", r"\*") for name, why in refused.items())
    return ["", f"Not on this model: {'; '.join(said)}."]


def circumstances(**more: str) -> dict[str, str]:
    """Return with what was measured."""
    return {
        "machine": f"{platform.machine()}, 1 thread",
        "torch": torch.__version__,
        **more,
        "peftcore": peftcore.__version__,
    }


def said(found: Mapping[str, str]) -> str:
    """Return the circumstances as a sentence."""
    return "; ".join(f"{name} {value}" for name, value in found.items()) + "."


@dataclass
class Kept:
    """What was found, as the file beside the benchmark has it: numbers that describe the model, rows by method, and
    reasons of those that do not act."""

    about: dict[str, Any]
    rows: dict[str, Row] = dataclasses.field(default_factory=dict)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def after(cls, about: dict[str, Any], refused: Mapping[str, PeftcoreError], former: Kept | None) -> Kept:
        """Return what a run begins with: the rows of a former one that it is to change, but for what is refused."""
        rows = {} if former is None else {name: row for name, row in former.rows.items() if name not in refused}
        return cls(about, rows, {**(former.refused if former else {}), **reasons(refused)})

    def measure(self, task: Task, method: str, tick: Callable[[], None]) -> bool:
        """Measure a method and put its row in the place of a former one, or the reason why there is none; return
        whether there is one."""
        self.rows.pop(method, None)
        self.refused.pop(method, None)
        try:
            self.rows[method] = measure(task, method, tick)
        except PeftcoreError as error:
            self.refused |= reasons({method: error})
        return method in self.rows

    def sorted(self, score: str, *, greater: bool) -> list[Row]:
        """Return the rows, the best first."""
        return sorted(self.rows.values(), key=lambda row: row.mean(score), reverse=greater)


def write(path: Path, parts: Mapping[str, Kept], found: Mapping[str, str]) -> None:
    """Write all parts of a benchmark, and the circumstances."""
    content = {"circumstances": dict(found), "parts": {name: dataclasses.asdict(part) for name, part in parts.items()}}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Kept]:
    """Read what was found before, or nothing."""
    if not path.exists():
        return {}
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    return {
        name: Kept(part["about"], {key: Row(**row) for key, row in part["rows"].items()}, part["refused"])
        for name, part in parts.items()
    }


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what both benchmarks are told."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=description)
    made.add_argument("methods", nargs="*", help="some methods, which take the places of their former rows; else all")
    made.add_argument("--page", action="store_true", help="write the results, the pictures and docs/benchmarks.md")
    made.add_argument("--steps", type=int, help="of each training and of pretraining, to try it quickly")
    made.add_argument("--root", type=Path, default=ROOT, help="the folder that has benchmarks/ and docs/")
    return made
