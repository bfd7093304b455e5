"""What a comparison found: a table for people, JSON for programs, a picture for both."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peftcore import __version__
from peftcore.cli.data import Task
from peftcore.cli.training import Schedule

LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True)
class Result:
    """One method's run. Sizes are in bytes, ``losses`` are means over a tenth of the steps each."""

    method: str
    options: dict[str, Any]
    learning_rate: float
    trainable: int
    total: int
    accuracy_before: float
    accuracy_after: float
    standard_error: float
    losses: tuple[float, ...]
    seconds_per_step: float
    peak_memory: int
    file_size: int
    folder: str

    @property
    def share(self) -> float:
        return self.trainable / self.total


@dataclass(frozen=True)
class Report:
    """All runs of a comparison and the circumstances they share."""

    model: str
    data: str
    labels: tuple[str, ...]
    train_size: int
    held_out_size: int
    majority: float
    schedule: Schedule
    max_length: int
    seconds: float
    results: tuple[Result, ...]

    @classmethod
    def of(
        cls, model: Path, task: Task, schedule: Schedule, max_length: int, results: Sequence[Result], seconds: float
    ) -> Report:
        return cls(
            model=str(model),
            data=task.source,
            labels=task.labels,
            train_size=len(task.train),
            held_out_size=len(task.held_out),
            majority=task.majority,
            schedule=schedule,
            max_length=max_length,
            seconds=seconds,
            results=tuple(results),
        )

    def as_dict(self) -> dict[str, Any]:
        document = asdict(self)
        for entry, result in zip(document["results"], self.results, strict=True):
            entry["share"] = result.share
        return {"versions": {"peftcore": __version__, **{name: version(name) for name in LIBRARIES}}, **document}

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2)

    def write(self, folder: Path) -> None:
        """``results.json`` and ``results.png``."""
        from peftcore.cli.picture import draw_picture

        (folder / "results.json").write_text(self.as_json() + "\n", encoding="utf-8")
        draw_picture(self, folder / "results.png")

    def table(self) -> Any:
        """A rich table, one row a method; the best accuracy is set in bold."""
        from rich import box
        from rich.table import Table

        best = max(result.accuracy_after for result in self.results)
        table = Table(box=box.SIMPLE_HEAD, title=self.title(), caption=self.caption(), title_justify="left")
        table.padding, table.pad_edge = (0, 0, 0, 1), False
        table.caption_justify = "left"
        table.add_column("method", no_wrap=True)
        for heading in ("trainable", "share", "before", "after", "s/step", "peak\nmemory", "saved\nfile"):
            table.add_column(heading, justify="right", no_wrap=True)
        for result in self.results:
            after = f"{result.accuracy_after:.3f}"
            table.add_row(
                result.method,
                f"{result.trainable:,}",
                f"{result.share:.2%}",
                f"{result.accuracy_before:.3f}",
                f"[bold]{after}[/bold]" if result.accuracy_after == best else after,
                f"{result.seconds_per_step:.2f}",
                size(result.peak_memory),
                size(result.file_size),
            )
        return table

    def title(self) -> str:
        steps = f"{self.schedule.steps} steps of {self.schedule.batch_size} texts"
        return f"Accuracy on {self.held_out_size:,} held-out texts after {steps} ({self.data})"

    def caption(self) -> str:
        error = max(result.standard_error for result in self.results)
        return (
            f"Majority class: {self.majority:.3f}. Standard error of an accuracy: {error:.3f}. "
            f"{len(self.results)} methods in {self.seconds / 60:.1f} minutes."
        )


def standard_error(accuracy: float, count: int) -> float:
    """Of an accuracy measured on ``count`` independent examples."""
    return math.sqrt(accuracy * (1 - accuracy) / count)


def size(count: int) -> str:
    """Bytes for people: three digits and a decimal unit."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
