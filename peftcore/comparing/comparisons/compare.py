"""Carries a comparison out: trains each configuration with each seed, and reports on all of them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Protocol

import peftcore
from peftcore.comparing.comparisons.comparison import Candidate, Comparison
from peftcore.comparing.errors import BadInput
from peftcore.comparing.quiet import no_bars
from peftcore.comparing.reports.files import write
from peftcore.comparing.reports.trials import Report, Trial
from peftcore.comparing.runs.folder import made
from peftcore.comparing.runs.reading import validated
from peftcore.comparing.runs.run import FULL
from peftcore.comparing.tasks import catalogue
from peftcore.comparing.training.memory import PeakMemory
from peftcore.comparing.training.train import Display, Outcome, train
from peftcore.errors import TrainingError


class Board(Display, Protocol):
    """A display that also hears of whole runs."""

    def begin(self, label: str) -> None:
        """Note that the run of this configuration begins."""

    def finish(self, line: str) -> None:
        """Note that the run is done."""


def compare(comparison: Comparison, board: Board) -> Report:
    """Run a comparison; ``results.json``, ``results.png``, ``report.html`` and the runs are in ``comparison.out``
    afterwards.

    Raises:
        BadInput: something that is named cannot be used; nothing was trained.
    """
    began = time.perf_counter()
    no_bars()
    task = catalogue.find(comparison.task)
    _check(comparison)
    trials: list[Trial] = []
    failed: dict[str, str] = {}
    last: Outcome | None = None
    for candidate in comparison.methods:
        for seed in comparison.seeds:
            board.begin(candidate.called)
            try:
                trial, last = run_trial(comparison, candidate, seed, board)
            except TrainingError as error:
                failed[candidate.called] = str(error)
                board.finish(f"{candidate.called:<16} failed: {error}")
                continue
            trials.append(trial)
            change = f"{trial.before[task.metric]:.3f} -> {trial.after[task.metric]:.3f}"
            board.finish(f"{candidate.called:<16} {task.metric} {change}")
    if last is None:
        raise TrainingError("; ".join(f"{label}: {reason}" for label, reason in failed.items()))
    report = Report(
        model=comparison.model,
        task=comparison.task,
        data=str(comparison.data["train"]),
        metric=task.metric,
        greater=task.greater,
        train_size=last.train_size,
        held_out_size=last.held_out_size,
        floor=last.floor,
        training=comparison.training.model_dump(mode="json"),
        trials=tuple(trials),
        seconds=time.perf_counter() - began,
        failed=failed,
    )
    write(report, comparison.out)
    return report


def _check(comparison: Comparison) -> None:
    """Plan every method first: one that cannot act on this model says so now, not after an hour of training."""
    labels = [candidate.called for candidate in comparison.methods]
    repeated = {label for label in labels if labels.count(label) > 1}
    if repeated:
        raise BadInput(f"two configurations are called {min(repeated)}: give one of them a label")
    for candidate in comparison.methods:
        if candidate.name != FULL:
            peftcore.method(candidate.name)
    made(comparison.out)
    run = comparison.run(comparison.methods[0], comparison.seeds[0])
    task = catalogue.find(comparison.task)
    prepared = task.prepare(run, validated(task.Data, run.data, "data"))
    for candidate in comparison.methods:
        if candidate.name != FULL:
            arguments = candidate.arguments
            train = (*prepared.head, *arguments.pop("train", ()))
            peftcore.plan(prepared.adapted or prepared.model, candidate.name, train=train, **arguments)


def run_trial(comparison: Comparison, candidate: Candidate, seed: int, board: Display) -> tuple[Trial, Outcome]:
    """Train one configuration with one seed."""
    run = comparison.run(candidate, seed)
    shutil.rmtree(run.out, ignore_errors=True)  # of an earlier comparison
    with PeakMemory() as memory:
        outcome = train(run, board)
    trial = Trial(
        label=candidate.called,
        method=candidate.name,
        options=candidate.arguments,
        seed=seed,
        learning_rate=run.training.learning_rate,
        trainable=outcome.trainable,
        total=outcome.total,
        before=outcome.before,
        after=outcome.after,
        curve=outcome.curve,
        losses=outcome.losses,
        seconds_per_step=outcome.seconds_per_step,
        peak_memory=memory.peak,
        file_size=sum(file.stat().st_size for file in Path(outcome.saved).iterdir()),
        folder=Path(outcome.saved).relative_to(comparison.out).as_posix(),
    )
    return trial, outcome
