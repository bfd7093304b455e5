"""One small ViT and three tasks: methods that are told the task of each row, against an adapter for each task.

python examples/several-tasks/run.py writes results.json beside this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import peftcore
from peftcore import Fuse
from tasks import Task, encoder, tasks, upright

HERE = Path(__file__).parent
STEPS, PRETRAINING, BATCH, QUICK = 200, 300, 32, 10
"""Steps with all tasks, with as many rows of each; --quick divides them by 10."""
HEAD_RATE = 1e-2
BARE, ALONE, FUSED = "head alone", "an adapter a task", "adapter_fusion"
ADAPTER = {"method": "pfeiffer_adapter", "placement": "branch", "bottleneck": 8}
MATRICES = {"target": "all-linear"}


@dataclass(frozen=True)
class Recipe:
    """The learning rate of a method, and options of it."""

    lr: float
    options: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "lora": Recipe(1e-2, MATRICES),
    ALONE: Recipe(1e-2),
    FUSED: Recipe(3e-3),
    "polytropon": Recipe(1e-2, {**MATRICES, "skills": 3, "routing_ratio": 10.0}),
    "hyperformer": Recipe(1e-2, {"bottleneck": 8, "task_width": 16, "hidden": 32, "code": 16}),
    "hyperformer_pp": Recipe(1e-2, {"bottleneck": 8, "task_width": 16, "hidden": 32, "code": 16}),
    "mtl_lora": Recipe(1e-2, {**MATRICES, "dropout": 0.0}),
}


class Reader:
    """The model that knows upright digits, with a fresh head for the classes of all tasks. A row is scored among the
    classes of its own task."""

    def __init__(self, base: nn.Module, found: Sequence[Task]) -> None:
        self.tasks = [*found]
        self.names = [task.name for task in found]
        self.starts = torch.tensor([0, *(task.classes for task in found)]).cumsum(0)  # [tasks + 1]
        self.model = copy.deepcopy(base).requires_grad_(False)
        torch.manual_seed(0)
        self.head = nn.Linear(48, int(self.starts[-1]))
        self.model.set_submodule("head", self.head)

    def scores(self, pictures: Tensor, names: list[str]) -> Tensor:
        """Logits ``[rows, classes]``. Methods that know tasks are told that of each row."""
        with peftcore.call(self.model, task=names):
            logits: Tensor = self.model(pictures)
        number = torch.tensor([self.names.index(name) for name in names])
        classes = torch.arange(logits.shape[1])
        own = (classes >= self.starts[number, None]) & (classes < self.starts[number + 1, None])
        return logits.masked_fill(~own, float("-inf"))

    def fit(self, adapters: Sequence[peftcore.Injection], names: Sequence[str], steps: int, lr: float) -> None:
        """Train what is trainable of adapters, and the head with them, on rows of these tasks."""
        optimizers = [each.optimizer(torch.optim.AdamW, lr=lr, weight_decay=0.0) for each in adapters]
        optimizers.append(torch.optim.AdamW(self.head.parameters(), lr=HEAD_RATE, weight_decay=0.0))
        schedules = [_falling(each, steps) for each in optimizers]
        torch.manual_seed(0)  # for what draws in training
        self.model.train()
        for pictures, classes, told in self.batches(names, steps):
            loss = nn.functional.cross_entropy(self.scores(pictures, told), classes)
            (loss + sum(each.losses() for each in adapters)).backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        self.model.eval()

    def batches(self, names: Sequence[str], steps: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """Pictures, classes and tasks, of each of the tasks as many; the same for whoever asks."""
        drawn = torch.Generator().manual_seed(0)
        for _ in range(steps):
            parts = []
            for task, start in zip(self.tasks, self.starts, strict=False):
                pictures, classes = task.train
                rows = torch.randint(len(classes), (BATCH,), generator=drawn)
                if task.name in names:
                    parts.append((pictures[rows], classes[rows] + start, [task.name] * BATCH))
            pictures, classes, told = zip(*parts, strict=True)
            yield torch.cat(pictures), torch.cat(classes), [name for each in told for name in each]

    @torch.no_grad()
    def accuracy(self, names: Sequence[str]) -> dict[str, float]:
        """By task."""
        found = {}
        for task, start in zip(self.tasks, self.starts, strict=False):
            if task.name in names:
                pictures, classes = task.held_out
                best = self.scores(pictures, [task.name] * len(classes)).argmax(-1)
                found[task.name] = float((best == classes + start).float().mean())
        return found


def _falling(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A rate that falls to nothing in the second half."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    method: str
    accuracy: dict[str, float]
    trainable: int
    """Without the head, which all have."""
    seconds: float
    """Of the processor, so that other programs do not count."""


def trainable(adapter: peftcore.Injection) -> int:
    return sum(each.numel() for each in adapter.parameters() if each.requires_grad)


def alone(base: nn.Module, found: Sequence[Task], steps: int, folder: Path) -> tuple[dict[str, float], int]:
    """Train an adapter for each task, each with a head of its own, and save them."""
    accuracy, count = {}, 0
    for task in found:
        reader = Reader(base, found)
        adapter = peftcore.apply(reader.model, name=task.name, **ADAPTER)
        reader.fit([adapter], [task.name], steps, RECIPES[ALONE].lr)
        accuracy |= reader.accuracy([task.name])
        count += trainable(adapter)
        adapter.save(folder / task.name)
    return accuracy, count


def fused(base: nn.Module, found: Sequence[Task], steps: int, folder: Path) -> tuple[dict[str, float], int]:
    """Train a fusion of these adapters, which stay as they are, on all tasks."""
    reader, recipe = Reader(base, found), RECIPES[FUSED]
    for name in reader.names:
        peftcore.load(reader.model, folder / name, name=name)  # frozen, as it is loaded
    fusion = peftcore.apply(reader.model, FUSED, name="fusion", adapters=reader.names, **recipe.options)
    peftcore.activate(reader.model, Fuse(*reader.names, by="fusion"))
    reader.fit([fusion], reader.names, steps, recipe.lr)
    return reader.accuracy(reader.names), trainable(fusion)


def together(base: nn.Module, found: Sequence[Task], steps: int, method: str) -> tuple[dict[str, float], int]:
    """Train one adapter on all tasks: with the names of the tasks, if it knows them."""
    reader = Reader(base, found)
    if method == BARE:
        reader.fit([], reader.names, steps, 0.0)
        return reader.accuracy(reader.names), 0
    recipe, known = RECIPES[method], {} if method == "lora" else {"tasks": reader.names}
    adapter = peftcore.apply(reader.model, method, **known, **recipe.options)
    reader.fit([adapter], reader.names, steps, recipe.lr)
    return reader.accuracy(reader.names), trainable(adapter)


def pretrained(steps: int) -> nn.Module:
    """The model that reads upright digits."""
    torch.manual_seed(0)
    model, (pictures, classes) = encoder(10), upright()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        rows = torch.randint(len(classes), (64,))
        nn.functional.cross_entropy(model(pictures[rows]), classes[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--out", type=Path, default=HERE)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    divided = QUICK if asked.quick else 1
    steps, found, results = STEPS // divided, tasks(), []
    base = pretrained(PRETRAINING // divided)
    with TemporaryDirectory() as folder:
        for method in (BARE, *RECIPES):
            began = time.process_time()
            if method in (ALONE, FUSED):
                accuracy, count = (alone if method == ALONE else fused)(base, found, steps, Path(folder))
            else:
                accuracy, count = together(base, found, steps, method)
            results.append(Result(method, accuracy, count, time.process_time() - began))
    table = Table("method", *results[0].accuracy, "mean", "trainable", "seconds")
    for each in results:
        scores = [*each.accuracy.values(), sum(each.accuracy.values()) / len(each.accuracy)]
        table.add_row(each.method, *(f"{score:.3f}" for score in scores), f"{each.trainable:,}", f"{each.seconds:.1f}")
    seconds = time.process_time()
    Console().print(table, f"{seconds:.0f} seconds of one core", highlight=False)
    asked.out.mkdir(parents=True, exist_ok=True)
    document = {"seconds": seconds, "results": [asdict(each) for each in results]}
    (asked.out / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
