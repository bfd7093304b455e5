"""The job of ``peftcore compare``: several methods, seeds and configurations on one task, each trained by
`peftcore.cli.training.train`; one report."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator

import peftcore
from peftcore.cli import tasks
from peftcore.cli.comparing.report import write
from peftcore.cli.comparing.trials import FULL, Report, Trial
from peftcore.cli.errors import BadInput
from peftcore.cli.looking.quiet import no_bars
from peftcore.cli.output import made
from peftcore.cli.training.memory import PeakMemory
from peftcore.cli.training.runs import MethodChoice, Options, Run, Training, validated
from peftcore.cli.training.train import Display, Outcome, train
from peftcore.errors import TrainingError


class Candidate(MethodChoice):
    """One configuration of a method."""

    label: str | None = None
    """What it is called in the report; the method's name, unless set."""
    learning_rate: PositiveFloat | None = None
    """Instead of that which all have."""

    @property
    def called(self) -> str:
        return self.label or self.name


class Comparison(Options):
    """What is compared: a run of `train`, but with several methods and seeds."""

    model: str
    task: str = "text-classification"
    data: dict[str, Any]
    methods: list[Candidate] = Field(min_length=1)
    """Names, or ``{name: lora, rank: 8, learning_rate: 2e-3, label: small}``; ``full`` is full fine-tuning."""
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    """Each method is trained with each."""
    training: Training = Field(default_factory=lambda: Training.model_validate({"steps": 100}))
    dtype: str = "float32"
    quantize: str | None = None
    out: Path = Path("peftcore-compare")
    """Folder for the report, and for a folder of each run."""

    @field_validator("methods", mode="before")
    @classmethod
    def _by_name_alone(cls, value: Any) -> Any:
        listed = value.split(",") if isinstance(value, str) else value
        if not isinstance(listed, list):
            return listed
        return [{"name": each.strip()} if isinstance(each, str) else each for each in listed if each]

    def run(self, candidate: Candidate, seed: int) -> Run:
        """The run of one trial. Its score is that after the last step: to choose the best would be to peek."""
        training = self.training.model_dump() | {"seed": seed, "checkpoints": False}
        if candidate.learning_rate is not None:
            training["learning_rate"] = candidate.learning_rate
        folder = re.sub(r"[^\w.-]+", "-", candidate.called) + (f"-{seed}" if len(self.seeds) > 1 else "")
        shared = self.model_dump(include={"model", "task", "data", "dtype", "quantize"})
        method = {"name": candidate.name, **candidate.arguments}
        whole = {**shared, "method": method, "training": training, "out": self.out / "runs" / folder}
        return validated(Run, whole, candidate.called)


class Board(Display, Protocol):
    """A display that also hears of whole runs."""

    def begin(self, label: str) -> None:
        """The run of this configuration begins."""

    def finish(self, line: str) -> None:
        """It is done."""


def compare(comparison: Comparison, board: Board) -> Report:
    """Run it; ``results.json``, ``results.png``, ``report.html`` and the runs are in ``comparison.out`` afterwards.

    Raises:
        BadInput: something that is named cannot be used; nothing was trained.
    """
    began = time.perf_counter()
    no_bars()
    task = tasks.find(comparison.task)
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
    task = tasks.find(comparison.task)
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
