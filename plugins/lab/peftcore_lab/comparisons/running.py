"""Executes the runs of a comparison, and stores the result of each run next to its adapter. A run with a stored result
is recognized as finished.

A *job* is the work of one process at a time: a configuration with a seed, or several that train together on one model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from peftcore.errors import TrainingError
from peftcore.files.safe_io import write_text
from peftcore_lab.comparisons.comparison import Candidate, Comparison
from peftcore_lab.reports.trials import Trial
from peftcore_lab.runs import folder
from peftcore_lab.runs.folder import holds
from peftcore_lab.runs.run import Run
from peftcore_lab.training.fleet_runs import Saved, key, train_together
from peftcore_lab.training.memory import PeakMemory
from peftcore_lab.training.train import Outcome, RunDisplay, train

RECORD = "trial.json"
"""The file with the result of a finished run."""


class Board(RunDisplay, Protocol):
    """A display that is also notified when a run begins and ends."""

    def begin(self, label: str) -> None:
        """Display that the run of this configuration begins."""

    def finish(self, line: str) -> None:
        """Display that the run is finished, with a line about its result."""


@dataclass(frozen=True)
class Ran:
    """The result of one run, and values that are the same for all runs of a comparison."""

    trial: Trial
    train_size: int
    held_out_size: int
    floor: float | None


Result = Ran | TrainingError


@dataclass(frozen=True)
class Job:
    """Configurations that train together with one seed; most often a single one."""

    candidates: tuple[Candidate, ...]
    seed: int


Finding = tuple[Candidate, int, Result]
"""A configuration, its seed, and its result."""


class JobRunner(Protocol):
    """Executes jobs, in this process or elsewhere."""

    def results(
        self, comparison: Comparison, jobs: Sequence[Job], board: Board, saved: list[Saved], resume: bool
    ) -> Iterator[Finding]:
        """Yield the results in the order in which they arrive.

        Args:
            saved: a list to which the costs saved by training runs together are appended.
            resume: keep finished runs, and resume unfinished ones.
        """


class Here:
    """Executes one job after the other in this process."""

    def results(
        self, comparison: Comparison, jobs: Sequence[Job], board: Board, saved: list[Saved], resume: bool
    ) -> Iterator[Finding]:
        for job in jobs:
            done = carry_out(comparison, job, board, saved, resume)
            yield from ((each, job.seed, found) for each, found in zip(job.candidates, done, strict=True))


def jobs_of(comparison: Comparison) -> list[Job]:
    """Return all jobs of a comparison, ordered by configuration, or by seed if several configurations train
    together."""
    if comparison.together == 1:
        return [Job((each,), seed) for each in comparison.methods for seed in comparison.seeds]
    return [
        Job(tuple(group), seed) for seed in comparison.seeds for group in together(comparison, comparison.methods, seed)
    ]


def forget(comparison: Comparison, jobs: Iterable[Job]) -> None:
    """Remove the files that earlier comparisons wrote for the given jobs."""
    for job in jobs:
        for candidate in job.candidates:
            folder.forget(comparison.run(candidate, job.seed).out)


def carry_out(comparison: Comparison, job: Job, board: Board, saved: list[Saved], resume: bool = False) -> list[Result]:
    """Run one job, and return the result of each of its configurations."""
    if resume:
        known = [recorded(comparison.run(each, job.seed)) for each in job.candidates]
        if all(each is not None for each in known):
            return [each for each in known if each is not None]
    if len(job.candidates) > 1:
        return run_together(comparison, list(job.candidates), job.seed, board, saved)
    (candidate,) = job.candidates
    board.begin(candidate.called)
    return [_tried(comparison, candidate, job.seed, board, resume)]


def _tried(comparison: Comparison, candidate: Candidate, seed: int, board: RunDisplay, resume: bool = False) -> Result:
    try:
        return run_trial(comparison, candidate, seed, board, resume)
    except TrainingError as error:
        return error


def together(comparison: Comparison, candidates: Iterable[Candidate], seed: int) -> list[list[Candidate]]:
    """Return the candidates in groups that train together. A group has at most `comparison.together` candidates, and a
    candidate that trains alone is a separate group. Groups are ordered by their first candidates."""
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
    """Train configurations together on one model, and return their results. Configurations that turn out not to be able
    to train together are trained alone afterwards.

    Args:
        saved: a list to which the costs saved by training together are appended.
    """
    runs = [comparison.run(candidate, seed) for candidate in candidates]
    for run in runs:
        folder.forget(run.out)  # of an earlier comparison
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
            results.append(_ran(comparison, candidate, run, outcome, memory.peak // count, count))
    return results


def run_trial(comparison: Comparison, candidate: Candidate, seed: int, board: RunDisplay, resume: bool = False) -> Ran:
    """Train one configuration with one seed, and return the result. With `resume`, an unfinished run with the same
    settings is continued."""
    run = comparison.run(candidate, seed)
    goes_on = resume and holds(run)
    if not goes_on:
        folder.forget(run.out)  # of an earlier comparison
    with PeakMemory() as memory:
        outcome = train(run, board, goes_on)
    return _ran(comparison, candidate, run, outcome, memory.peak, 1)


def recorded(run: Run) -> Ran | None:
    """Return the stored result of a run; None if the run is not finished or had other settings."""
    try:
        held = json.loads((run.out / RECORD).read_text(encoding="utf-8"))
        ran = Ran(**{**held, "trial": Trial(**held["trial"])})
    except (OSError, ValueError, TypeError, KeyError):  # none there, or a damaged one
        return None
    return ran if holds(run) else None


def _ran(comparison: Comparison, candidate: Candidate, run: Run, outcome: Outcome, peak: int, count: int) -> Ran:
    trial = _trial(comparison, candidate, run, outcome, peak, count)
    ran = Ran(trial, outcome.train_size, outcome.held_out_size, outcome.floor)
    write_text(run.out / RECORD, json.dumps(asdict(ran), indent=2) + "\n")
    return ran


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
        file_size=sum(file.stat().st_size for file in Path(outcome.saved).iterdir() if file.is_file()),
        folder=Path(outcome.saved).relative_to(comparison.out).as_posix(),
        together=count,
        picture=Path(outcome.picture).relative_to(comparison.out).as_posix() if outcome.picture else "",
    )
