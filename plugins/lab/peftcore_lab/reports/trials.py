"""Trials of a comparison as data, one for each configuration and seed, and the settings that all trials share."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

from peftcore import __version__
from peftcore.utils.packages import PACKAGE

LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True)
class Trial:
    """One run. Sizes are in bytes."""

    label: str
    """The name of the configuration: the method, or the method and its distinguishing options."""
    method: str
    options: dict[str, Any]
    seed: int
    learning_rate: float | None
    """None if a function of the user trained the model."""
    trainable: int
    total: int
    before: dict[str, float]
    after: dict[str, float]
    """Scores by name, including the metric of the report."""
    curve: list[tuple[int, float]]
    """Pairs of a step and the metric at that step."""
    losses: list[tuple[int, float]]
    """Pairs of a step and the mean training loss since the previous pair."""
    seconds_per_step: float
    peak_memory: int
    file_size: int
    folder: str
    together: int = 1
    """How many runs trained together on one model, including this one. Seconds and memory are this run's share of their
    sum."""
    picture: str = ""
    """A file in the comparison's folder with pictures that the model generated, if the task has pictures."""

    @property
    def share(self) -> float:
        """Return the share of trainable parameters among all parameters."""
        return self.trainable / self.total


@dataclass(frozen=True)
class ConfigurationTrials:
    """The trials of one configuration, one for each seed."""

    label: str
    trials: tuple[Trial, ...]
    score: float
    """The mean of the metric after training."""
    error: float | None
    """The standard error of the mean score. With one seed, it is the standard error of an accuracy on the held-out
    examples, and None for other metrics."""

    @property
    def trainable(self) -> int:
        return self.trials[0].trainable

    @property
    def seconds_per_step(self) -> float:
        return statistics.mean(trial.seconds_per_step for trial in self.trials)

    @property
    def peak_memory(self) -> int:
        return round(statistics.mean(trial.peak_memory for trial in self.trials))


@dataclass(frozen=True)
class ComparisonReport:
    """All trials of a comparison, and the settings that they share."""

    model: str
    task: str
    data: str
    metric: str
    greater: bool
    """Whether a higher metric is better."""
    train_size: int
    held_out_size: int
    training: dict[str, Any]
    """The training options (`peftcore_lab.runs.run.Training`)."""
    trials: tuple[Trial, ...]
    seconds: float
    floor: float | None = None
    """The majority baseline, if it is known: the metric if the answer is always the most frequent class."""
    failed: dict[str, str] = field(default_factory=dict)
    """The reasons why configurations failed, by label."""
    tuned: str = ""
    """A sentence about how the learning rates were chosen; empty if they were not."""
    together: tuple[str, ...] = ()
    """For each group of runs that trained together on one model, a sentence about the costs that this saved."""

    @property
    def model_name(self) -> str:
        """Return the short name of the model: the name of its package, folder or file, or its name on the Hub without
        the owner."""
        return short_name(self.model)

    @property
    def data_name(self) -> str:
        """Return the file name of the examples, without its folder."""
        return short_name(self.data)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the names of the tasks that have separate scores."""
        names = dict.fromkeys(name for trial in self.trials for name in trial.after)
        start = f"{self.metric}/"
        return tuple(name.removeprefix(start) for name in names if name.startswith(start))

    def of_task(self, task: str) -> ComparisonReport:
        """Return the report of one task. Its scores replace those of all rows. The baseline and the number of examples
        are left out, since they are unknown for single tasks."""
        name = f"{self.metric}/{task}"
        trials = tuple(
            replace(
                each,
                after={self.metric: each.after.get(name, math.nan)},
                before={self.metric: each.before.get(name, math.nan)},
            )
            for each in self.trials
        )
        return replace(self, trials=trials, floor=None, held_out_size=0)

    def entries(self) -> list[ConfigurationTrials]:
        """Return the configurations in the order of their first trials."""
        labels = dict.fromkeys(trial.label for trial in self.trials)
        return [self._entry(label, [t for t in self.trials if t.label == label]) for label in labels]

    def _entry(self, label: str, trials: list[Trial]) -> ConfigurationTrials:
        scores = [trial.after[self.metric] for trial in trials]
        mean = statistics.mean(scores)
        error = None
        if not math.isfinite(mean):
            pass
        elif len(scores) > 1:
            error = statistics.stdev(scores) / math.sqrt(len(scores))
        elif self.metric == "accuracy" and self.held_out_size:
            error = math.sqrt(mean * (1 - mean) / self.held_out_size)
        return ConfigurationTrials(label, tuple(trials), mean, error)

    def better(self, one: float, other: float) -> bool:
        """Whether a score is better than another."""
        return one > other if self.greater else one < other

    def front(self) -> list[ConfigurationTrials]:
        """Return the Pareto front, ordered by trainable parameters: the configurations for which no better one of at
        most the same size exists."""
        return front(self.entries(), self.better)

    def as_json(self) -> str:
        """Return the report as JSON, for programs."""
        document = {"versions": versions(), **asdict(self)}
        for entry, trial in zip(document["trials"], self.trials, strict=True):
            entry["share"] = trial.share
        return json.dumps(document, indent=2) + "\n"


def short_name(source: str) -> str:
    """Return a short name for headings: the last part of a path or of a name on the Hub, or NAME of
    ``package:NAME/FOLDER``."""
    if source.startswith(PACKAGE):
        return source.removeprefix(PACKAGE).partition("/")[0]
    return Path(source).name or source


def versions() -> dict[str, str]:
    """Return the versions of the libraries on which the results depend."""
    return {"peftcore": __version__, **{name: version(name) for name in LIBRARIES}}


def front(
    entries: Iterable[ConfigurationTrials],
    better: Callable[[float, float], bool],
    cost: Callable[[ConfigurationTrials], float] = attrgetter("trainable"),
) -> list[ConfigurationTrials]:
    """Return each entry that is better than all cheaper ones, ordered from the cheapest to the most expensive. Entries
    whose score is not finite are left out."""
    found: list[ConfigurationTrials] = []
    sign = -1 if better(1, 0) else 1
    scored = (entry for entry in entries if math.isfinite(entry.score))
    for entry in sorted(scored, key=lambda each: (cost(each), sign * each.score)):
        if not found or better(entry.score, found[-1].score):
            found.append(entry)
    return found
