"""The job of ``peftcore compare``: every method on the same model, data, head and batches; one report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

import peftcore
from peftcore.cli.data import Encoded, Task, arrange, draw, encode
from peftcore.cli.demo import FULL, RECIPES, Recipe
from peftcore.cli.errors import BadInput
from peftcore.cli.memory import PeakMemory
from peftcore.cli.models import load_model, load_tokenizer, quiet
from peftcore.cli.report import Report, Result, standard_error
from peftcore.cli.training import Progress, Schedule, run


@dataclass(frozen=True)
class Job:
    """What to compare, on what, and where to write it."""

    model: Path
    task: Task
    methods: tuple[str, ...]
    out: Path
    schedule: Schedule
    max_length: int
    learning_rate: float | None = None
    """One learning rate for all; otherwise each method's own."""

    def recipe(self, method: str) -> Recipe:
        recipe = RECIPES.get(canonical(method), Recipe())
        return recipe if self.learning_rate is None else Recipe(self.learning_rate, recipe.options)


class Display(Progress, Protocol):
    """A progress display that also hears of whole methods."""

    def begin(self, method: str) -> None:
        """The run of ``method`` begins."""

    def finish(self, result: Result) -> None:
        """It is done."""


def run_all(job: Job, display: Display) -> Report:
    """Run the job; adapters, ``results.json`` and ``results.png`` are in ``job.out`` afterwards."""
    began = time.perf_counter()
    quiet()
    tokenizer = load_tokenizer(job.model)
    check(job, tokenizer)
    train, held_out = encoded(job, tokenizer)
    results = []
    for method in job.methods:
        display.begin(method)
        results.append(run_method(job, method, tokenizer, train, held_out, display))
        display.finish(results[-1])
    report = Report.of(job.model, job.task, job.schedule, job.max_length, results, time.perf_counter() - began)
    report.write(job.out)
    return report


def choose_methods(listed: str) -> tuple[str, ...]:
    """Refuse unknown and repeated names before anything is loaded; ``full`` is the reference, no method."""
    names = [name.strip() for name in listed.split(",") if name.strip()]
    resolved = [canonical(name) for name in names]
    repeated = {name for name in resolved if resolved.count(name) > 1}
    if repeated:
        raise BadInput(f"--methods names {min(repeated)} twice")
    if not names:
        raise BadInput("--methods names no method")
    return tuple(names)


def canonical(name: str) -> str:
    """A method's own name, where the user may have written an alias or ``plugin/name``."""
    return name if name == FULL else peftcore.method(name).name


def check(job: Job, tokenizer: Any) -> None:
    """Plan every method first: one that cannot act on this model says so now, not after an hour of training."""
    try:
        job.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{job.out}: cannot be written to ({error.strerror})") from error
    model, head = load_model(job.model, job.task.labels, tokenizer, job.schedule.seed)
    for method in job.methods:
        if method != FULL:
            peftcore.plan(model, method, train=head, **job.recipe(method).options)


def encoded(job: Job, tokenizer: Any) -> tuple[list[Encoded], list[Encoded]]:
    """The training texts in their batches, and the held-out ones."""
    schedule = job.schedule
    drawn = draw(job.task.train, schedule.steps * schedule.batch_size, schedule.seed)
    train = arrange(encode(tokenizer, drawn, job.task.labels, job.max_length), schedule.batch_size, schedule.seed)
    return train, encode(tokenizer, job.task.held_out, job.task.labels, job.max_length)


def run_method(
    job: Job, method: str, tokenizer: Any, train: list[Encoded], held_out: list[Encoded], progress: Progress
) -> Result:
    recipe = job.recipe(method)
    with PeakMemory() as memory:
        model, head = load_model(job.model, job.task.labels, tokenizer, job.schedule.seed)
        total = count(model)
        injection = None
        if method != FULL:
            injection = peftcore.apply(model, method, train=head, seed=job.schedule.seed, **recipe.options)
        outcome = run(model, tokenizer, train, held_out, recipe.learning_rate, job.schedule, progress)
    folder = job.out / "adapters" / canonical(method)
    save(model, injection, folder)
    return Result(
        method=method,
        options=dict(recipe.options),
        learning_rate=recipe.learning_rate,
        trainable=count(model, trainable_only=True),
        total=total,
        accuracy_before=outcome.accuracy_before,
        accuracy_after=outcome.accuracy_after,
        standard_error=standard_error(outcome.accuracy_after, len(held_out)),
        losses=outcome.losses,
        seconds_per_step=outcome.seconds_per_step,
        peak_memory=memory.peak,
        file_size=sum(file.stat().st_size for file in folder.iterdir()),
        folder=folder.relative_to(job.out).as_posix(),
    )


def save(model: Any, injection: peftcore.Injection | None, folder: Path) -> None:
    """The adapter; for full fine-tuning there is none to save but the whole model."""
    if injection is None:
        model.save_pretrained(folder)
    else:
        injection.save(folder)


def count(model: nn.Module, trainable_only: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)
