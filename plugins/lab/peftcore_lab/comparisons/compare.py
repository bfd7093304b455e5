"""Runs a comparison: trains each configuration with each seed, and reports on all of them."""

from __future__ import annotations

import time
from pathlib import Path

import peftcore
from peftcore.errors import BadInput, TrainingError
from peftcore.utils.quiet import no_bars
from peftcore_lab.comparisons import rates
from peftcore_lab.comparisons.comparison import Comparison
from peftcore_lab.comparisons.running import Board, Here, JobRunner, Ran, jobs_of
from peftcore_lab.reports.report_files import write
from peftcore_lab.reports.trials import ComparisonReport, Trial
from peftcore_lab.runs.folder import made
from peftcore_lab.runs.reading import validated
from peftcore_lab.runs.run import FULL
from peftcore_lab.tasks import task_catalogue
from peftcore_lab.training.fleet_runs import Saved
from peftcore_lab.training.task_rows import options_for


def compare(
    comparison: Comparison, board: Board, resume: bool = False, place: JobRunner | None = None
) -> ComparisonReport:
    """Run a comparison and return its report. ``results.json``, ``results.png``, ``report.html`` and the runs are
    written to ``comparison.out``.

    Args:
        comparison: the methods, model and data.
        board: the display of the progress.
        resume: keep the finished runs in ``comparison.out`` that have the same settings. Unfinished runs are resumed
            from their last checkpoint, if they have one.
        place: where runs are executed; by default in this process, one after the other.

    Raises:
        BadInput: a model, method or data cannot be used; nothing was trained.
    """
    no_bars()
    place = place or Here()
    if not comparison.tune_lr:
        return _compared(comparison, board, resume, place)
    made(comparison.out)
    tuning, reported = rates.on_tuning(comparison)
    methods, said = rates.chosen(comparison, _compared(tuning, board, resume, place))
    board.say(said)
    return _compared(reported.model_copy(update={"methods": methods}), board, resume, place, said)


def _compared(
    comparison: Comparison, board: Board, resume: bool, place: JobRunner, tuned: str = ""
) -> ComparisonReport:
    began = time.perf_counter()
    task = task_catalogue.find(comparison.task)
    _check(comparison)
    found: dict[tuple[str, int], Trial] = {}
    failed: dict[str, str] = {}
    saved: list[Saved] = []
    last: Ran | None = None
    for candidate, seed, result in place.results(comparison, jobs_of(comparison), board, saved, resume):
        if isinstance(result, TrainingError):
            failed[candidate.called] = str(result)
            board.finish(f"{candidate.called:<16} failed: {result}")
            continue
        last, trial = result, result.trial
        found[candidate.called, seed] = trial
        change = f"{trial.before[task.metric]:.3f} -> {trial.after[task.metric]:.3f}"
        board.finish(f"{candidate.called:<16} {task.metric} {change}")
    if last is None:
        raise TrainingError("; ".join(f"{label}: {reason}" for label, reason in failed.items()))
    order = [(candidate.called, seed) for candidate in comparison.methods for seed in comparison.seeds]
    report = ComparisonReport(
        model=comparison.model,
        task=comparison.task,
        data=str(comparison.data["train"]),
        metric=task.metric,
        greater=task.greater,
        train_size=last.train_size,
        held_out_size=last.held_out_size,
        floor=last.floor,
        training=comparison.training.model_dump(mode="json"),
        trials=tuple(found[each] for each in order if each in found),
        seconds=time.perf_counter() - began,
        failed=failed,
        together=tuple(map(str, saved)),
        tuned=tuned,
    )
    write(report, comparison.out)
    return report


def _check(comparison: Comparison) -> None:
    """Plan every method before training, so that a method that cannot act on this model raises its error now."""
    labels = [candidate.called for candidate in comparison.methods]
    repeated = {label for label in labels if labels.count(label) > 1}
    if repeated:
        raise BadInput(f"two configurations are called {min(repeated)}: set another label for one of them")
    for candidate in comparison.methods:
        if candidate.name != FULL:
            peftcore.method(candidate.name)
    _check_folders(comparison)
    task_catalogue.find(comparison.task).check_model(comparison.model)
    made(comparison.out)
    run = comparison.run(comparison.methods[0], comparison.seeds[0])
    task = task_catalogue.find(comparison.task)
    prepared = task.prepare(run, validated(task.Data, run.data, "data"))
    for candidate in comparison.methods:
        prepared.check_method(candidate.name)
        if candidate.name != FULL:
            arguments = options_for(candidate, prepared.tasks)
            train = (*prepared.head, *arguments.pop("train", ()))
            peftcore.plan(prepared.adapted or prepared.model, candidate.name, train=train, **arguments)


def _check_folders(comparison: Comparison) -> None:
    """Check that each run has a separate folder. Two labels may have the same folder, since special characters are
    replaced in names of folders.

    Raises:
        BadInput: two runs have the same folder.
    """
    taken: dict[Path, str] = {}
    for candidate in comparison.methods:
        for seed in dict.fromkeys(comparison.seeds):
            folder = comparison.run(candidate, seed).out
            if folder in taken:
                raise BadInput(f"{taken[folder]} and {candidate.called} would share the folder {folder}: rename one")
            taken[folder] = candidate.called
