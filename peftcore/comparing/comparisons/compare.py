"""Carries a comparison out: trains each configuration with each seed, and reports on all of them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import peftcore
from peftcore.comparing.comparisons import rates
from peftcore.comparing.comparisons.comparison import Candidate, Comparison
from peftcore.comparing.errors import BadInput
from peftcore.comparing.quiet import no_bars
from peftcore.comparing.reports.files import write
from peftcore.comparing.reports.trials import Report, Trial
from peftcore.comparing.runs.folder import made
from peftcore.comparing.runs.reading import validated
from peftcore.comparing.runs.run import FULL, Run
from peftcore.comparing.tasks import catalogue
from peftcore.comparing.training.memory import PeakMemory
from peftcore.comparing.training.telling import options_for
from peftcore.comparing.training.together import Saved, key, train_together
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
    no_bars()
    if not comparison.tune_lr:
        return _compared(comparison, board)
    made(comparison.out)
    tuning, reported = rates.on_tuning(comparison)
    methods, said = rates.chosen(comparison, _compared(tuning, board))
    board.say(said)
    return _compared(reported.model_copy(update={"methods": methods}), board, said)


def _compared(comparison: Comparison, board: Board, tuned: str = "") -> Report:
    began = time.perf_counter()
    task = catalogue.find(comparison.task)
    _check(comparison)
    found: dict[tuple[str, int], Trial] = {}
    failed: dict[str, str] = {}
    saved: list[Saved] = []
    last: Outcome | None = None
    for seeds in [[each] for each in comparison.seeds] if comparison.together > 1 else [comparison.seeds]:
        for candidates in together(comparison, comparison.methods, seeds[0]):
            for candidate, seed, result in _run(comparison, candidates, seeds, board, saved):
                if isinstance(result, TrainingError):
                    failed[candidate.called] = str(result)
                    board.finish(f"{candidate.called:<16} failed: {result}")
                    continue
                trial, last = result
                found[candidate.called, seed] = trial
                change = f"{trial.before[task.metric]:.3f} -> {trial.after[task.metric]:.3f}"
                board.finish(f"{candidate.called:<16} {task.metric} {change}")
    if last is None:
        raise TrainingError("; ".join(f"{label}: {reason}" for label, reason in failed.items()))
    order = [(candidate.called, seed) for candidate in comparison.methods for seed in comparison.seeds]
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
        trials=tuple(found[each] for each in order if each in found),
        seconds=time.perf_counter() - began,
        failed=failed,
        together=tuple(map(str, saved)),
        tuned=tuned,
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
    catalogue.find(comparison.task).check_model(comparison.model)
    made(comparison.out)
    run = comparison.run(comparison.methods[0], comparison.seeds[0])
    task = catalogue.find(comparison.task)
    prepared = task.prepare(run, validated(task.Data, run.data, "data"))
    for candidate in comparison.methods:
        if candidate.name != FULL:
            arguments = options_for(candidate, prepared.tasks)
            train = (*prepared.head, *arguments.pop("train", ()))
            peftcore.plan(prepared.adapted or prepared.model, candidate.name, train=train, **arguments)


Result = tuple[Trial, Outcome] | TrainingError


def _run(
    comparison: Comparison, candidates: list[Candidate], seeds: list[int], board: Board, saved: list[Saved]
) -> Iterator[tuple[Candidate, int, Result]]:
    """Yield candidates, seeds and what was found."""
    if len(candidates) > 1:
        for candidate, result in zip(
            candidates, run_together(comparison, candidates, seeds[0], board, saved), strict=True
        ):
            yield candidate, seeds[0], result
        return
    for seed in seeds:
        board.begin(candidates[0].called)
        yield candidates[0], seed, _tried(comparison, candidates[0], seed, board)


def _tried(comparison: Comparison, candidate: Candidate, seed: int, board: Display) -> Result:
    try:
        return run_trial(comparison, candidate, seed, board)
    except TrainingError as error:
        return error


def together(comparison: Comparison, candidates: Iterable[Candidate], seed: int) -> list[list[Candidate]]:
    """Return the candidates in groups that train together, at most so many as the comparison says; what trains alone is
    a group of its own. Groups are in the order of their first ones."""
    groups: list[list[Candidate]] = []
    growing: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        shared = key(comparison.run(candidate, seed)) if comparison.together > 1 else None
        group = growing.get(shared) if shared is not None else None
        if group is None or len(group) >= comparison.together:
            groups.append(group := [])
            if shared is not None:
                growing[shared] = group
        group.append(candidate)
    return groups


def run_together(
    comparison: Comparison, candidates: list[Candidate], seed: int, board: Board, saved: list[Saved]
) -> list[Result]:
    """Train configurations at once on one model; those that turn out not to fit in train alone afterwards.

    Args:
        saved: gets what was saved.
    """
    runs = [comparison.run(candidate, seed) for candidate in candidates]
    for run in runs:
        shutil.rmtree(run.out, ignore_errors=True)  # of an earlier comparison
    board.begin(f"{len(runs)} configurations together")
    try:
        with PeakMemory() as memory:
            outcomes, found = train_together(runs, board)
    except TrainingError as error:
        return [error] * len(runs)
    if found is not None:
        saved.append(found)
        board.say(str(found))
    results: list[Result] = []
    for candidate, run, outcome in zip(candidates, runs, outcomes, strict=True):
        if outcome is None:
            board.begin(candidate.called)
            results.append(_tried(comparison, candidate, seed, board))
        elif isinstance(outcome, TrainingError):
            results.append(outcome)
        else:
            count = found.runs if found is not None else 1
            results.append((_trial(comparison, candidate, run, outcome, memory.peak // count, count), outcome))
    return results


def run_trial(comparison: Comparison, candidate: Candidate, seed: int, board: Display) -> tuple[Trial, Outcome]:
    """Train one configuration with one seed."""
    run = comparison.run(candidate, seed)
    shutil.rmtree(run.out, ignore_errors=True)  # of an earlier comparison
    with PeakMemory() as memory:
        outcome = train(run, board)
    return _trial(comparison, candidate, run, outcome, memory.peak, 1), outcome


def _trial(comparison: Comparison, candidate: Candidate, run: Run, outcome: Outcome, peak: int, count: int) -> Trial:
    return Trial(
        label=candidate.called,
        method=candidate.name,
        options=candidate.arguments,
        seed=run.training.seed,
        learning_rate=run.training.learning_rate,
        trainable=outcome.trainable,
        total=outcome.total,
        before=outcome.before,
        after=outcome.after,
        curve=outcome.curve,
        losses=outcome.losses,
        seconds_per_step=outcome.seconds_per_step,
        peak_memory=peak,
        file_size=sum(file.stat().st_size for file in Path(outcome.saved).iterdir()),
        folder=Path(outcome.saved).relative_to(comparison.out).as_posix(),
        together=count,
        picture=Path(outcome.picture).relative_to(comparison.out).as_posix() if outcome.picture else "",
    )
