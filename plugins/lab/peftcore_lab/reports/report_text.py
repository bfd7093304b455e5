"""The report of a comparison as sentences and as cells of tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from peftcore.utils.numbers import SPACE, counted, decimals, digits, duration, fixed, listed, percent, size
from peftcore_lab.reports.labels import plain
from peftcore_lab.reports.plots import is_reference, metric_name
from peftcore_lab.reports.trials import ComparisonReport, ConfigurationTrials, Trial, front, versions


def facts(report: ComparisonReport) -> list[tuple[str, str]]:
    """Return the settings of the comparison (model, data, training, versions) as pairs of a name and a text."""
    seeds = sorted({trial.seed for trial in report.trials})
    found = [
        ("Model", report.model),
        ("Task", report.task),
        ("Data", report.data),
        ("Examples", f"{report.train_size:,} for training, {report.held_out_size:,} for validation"),
        ("Training", length(report.training)),
        ("Seed" if len(seeds) == 1 else "Seeds", listed(seeds) if seeds else ""),
        ("Rates", report.tuned),
        ("Metric", metric_name(report)),
        ("± is", error(report)),
        ("Took", duration(report.seconds)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
    ]
    return [(name, text) for name, text in found if text]


def length(training: dict[str, Any]) -> str:
    """Return the length of training as a text, such as "300 steps of 2 × 16 examples"."""
    steps, epochs, accumulate = training.get("steps"), training.get("epochs"), training.get("accumulate", 1)
    batch = f"{accumulate} × {training['batch_size']}" if accumulate > 1 else f"{training['batch_size']}"
    if steps is not None:
        return f"{counted(steps, 'step')} of {batch} examples"
    passes = "3" if epochs is None else f"{epochs:g}"
    return f"{passes} passes over the data in steps of {batch} examples"


def error(report: ComparisonReport) -> str:
    """Return what the number after ± means, or an empty text if numbers are without ±."""
    entries = report.entries()
    if any(len(entry.trials) > 1 for entry in entries):
        return "one standard error of the mean over seeds"
    if any(entry.error is not None for entry in entries):
        return f"one standard error of an {report.metric} on {report.held_out_size:,} examples"
    return ""


def settings(report: ComparisonReport) -> list[tuple[str, str]]:
    """Return all training options that are set, except those that `facts` contains."""
    told = ("steps", "epochs", "batch_size", "accumulate", "seed")
    return [(name, str(value)) for name, value in report.training.items() if name not in told and value is not None]


@dataclass(frozen=True)
class Finding:
    """One of the main results of a comparison, such as the best score."""

    name: str
    score: str
    label: str
    detail: str


def findings(report: ComparisonReport) -> list[Finding]:
    """Return the main results: the best configuration, the smallest one that is about as good, full fine-tuning, and
    the majority baseline."""
    entries = [entry for entry in report.entries() if math.isfinite(entry.score)]
    if not entries:
        return []
    best = best_of(report, entries)
    reach = best.error or 0.0
    names = {best.label: "Best"}
    near = [entry for entry in entries if abs(entry.score - best.score) <= reach]
    names.setdefault(min(near, key=attrgetter("trainable")).label, "Smallest within one ± of the best")
    for name, reference in (("Best of those that train less", False), ("Full fine-tuning", True)):
        if alike := [entry for entry in entries if is_reference(entry) == reference]:
            names.setdefault(best_of(report, alike).label, name)
    by_label = {entry.label: entry for entry in entries}
    found = [finding(report, name, by_label[label]) for label, name in names.items()]
    if report.floor is not None:
        score = fixed(report.floor, decimals([report.floor]))
        found.append(Finding("Majority baseline", score, "", "the most frequent answer"))
    return found


def best_of(report: ComparisonReport, entries: list[ConfigurationTrials]) -> ConfigurationTrials:
    return front(entries, report.better, cost=lambda entry: 0)[0]


def finding(report: ComparisonReport, name: str, entry: ConfigurationTrials) -> Finding:
    detail = f"{entry.trainable:,} parameters ({percent(entry.trials[0].share)})"
    return Finding(name, score_text(report, entry), entry.label, detail)


def score_text(report: ComparisonReport, entry: ConfigurationTrials) -> str:
    """Return the score and its error as a text, with the number of decimals of all scores in the report."""
    places = decimals(each.score for each in report.entries())
    text = fixed(entry.score, places)
    return text if entry.error is None else f"{text}{SPACE}±{SPACE}{fixed(entry.error, places)}"


@dataclass(frozen=True)
class Column:
    """A column of the table: a value that every configuration has. The best value is bold."""

    name: str
    of: Callable[[ConfigurationTrials], float]
    shown: Callable[[ConfigurationTrials], str]
    best: Callable[[list[float]], float] | None

    @property
    def first(self) -> str:
        """Return the sort order of the first click on the column, which puts the best value at the top."""
        return "descending" if self.best is max else "ascending"


@dataclass(frozen=True)
class Cell:
    """One value of a column."""

    value: float | None
    text: str
    best: bool


@dataclass(frozen=True)
class ReportRow:
    """One configuration as a row of the table."""

    number: int
    label: str
    options: str
    best: bool
    """Whether the configuration is on the Pareto front."""
    cells: list[Cell]


def columns(report: ComparisonReport) -> list[Column]:
    """Return the columns of the table."""
    entries = report.entries()
    first = decimals(before(report, entry) for entry in entries)
    greatest = max if report.greater else min
    return [
        Column("trainable", attrgetter("trainable"), lambda entry: f"{entry.trainable:,}", min),
        Column("share", share, lambda entry: percent(share(entry)), min),
        Column(f"{report.metric} before", lambda e: before(report, e), lambda e: fixed(before(report, e), first), None),
        Column(f"{report.metric} after", attrgetter("score"), lambda entry: score_text(report, entry), greatest),
        *(_of_task(report.of_task(task), task) for task in report.tasks),
        Column("s/step", attrgetter("seconds_per_step"), lambda entry: digits(entry.seconds_per_step), min),
        Column("peak memory", attrgetter("peak_memory"), lambda entry: size(entry.peak_memory), min),
        Column("file size", file_size, lambda entry: size(file_size(entry)), min),
    ]


def _of_task(report: ComparisonReport, task: str) -> Column:
    """Return the column of one task's scores."""
    scored = {entry.label: entry for entry in report.entries()}
    greatest = max if report.greater else min
    return Column(
        task,
        lambda entry: scored[entry.label].score,
        lambda entry: score_text(report, scored[entry.label]),
        greatest,
    )


def share(entry: ConfigurationTrials) -> float:
    return entry.trials[0].share


def before(report: ComparisonReport, entry: ConfigurationTrials) -> float:
    return statistics.mean(trial.before[report.metric] for trial in entry.trials)


def file_size(entry: ConfigurationTrials) -> float:
    return statistics.mean(trial.file_size for trial in entry.trials)


def rows(report: ComparisonReport) -> list[ReportRow]:
    """Return the rows in the order of the report. A script of the page can sort them."""
    entries = report.entries()
    best = report.front()
    if not entries:
        return []
    cells = list(zip(*(column_cells(column, entries) for column in columns(report)), strict=True))
    return [
        ReportRow(number, entry.label, options(entry), entry in best, list(each))
        for number, (entry, each) in enumerate(zip(entries, cells, strict=True), 1)
    ]


def column_cells(column: Column, entries: list[ConfigurationTrials]) -> list[Cell]:
    """Return the cells of a column. All cells with the same text as the best one are marked as best."""
    values = [column.of(entry) for entry in entries]
    texts = [column.shown(entry) for entry in entries]
    finite = [value for value in values if math.isfinite(value)]
    best = column.best(finite) if column.best and len(finite) > 1 else None
    bold = {text for text, value in zip(texts, values, strict=True) if value == best}
    if set(texts) == bold:
        bold = set()
    return [
        Cell(value if math.isfinite(value) else None, text, text in bold)
        for value, text in zip(values, texts, strict=True)
    ]


def options(entry: ConfigurationTrials) -> str:
    """Return the options of a configuration as text, with its learning rate."""
    trial = entry.trials[0]
    rate = {} if trial.learning_rate is None else {"lr": trial.learning_rate}
    return ", ".join(f"{name}={value}" for name, value in {**trial.options, **rate}.items())


@dataclass(frozen=True)
class Runs:
    """All trials, with all their scores as texts."""

    scores: list[str]
    rows: list[tuple[Trial, list[str]]]


def runs(report: ComparisonReport) -> Runs:
    names = list(dict.fromkeys(name for trial in report.trials for name in trial.after))
    places = {name: decimals(trial.after.get(name, math.nan) for trial in report.trials) for name in names}
    texts = [
        [fixed(trial.after[name], places[name]) if name in trial.after else "" for name in names]
        for trial in report.trials
    ]
    return Runs(names, list(zip(report.trials, texts, strict=True)))


def tip(report: ComparisonReport, entry: ConfigurationTrials) -> str:
    """Return the tooltip of a configuration's mark in a chart."""
    return "\n".join(
        (
            plain(entry.label),
            f"{report.metric} {score_text(report, entry)}",
            f"{entry.trainable:,} trainable parameters ({percent(share(entry))})",
            f"{digits(entry.seconds_per_step)} s/step, {size(entry.peak_memory)} of memory",
        )
    )
