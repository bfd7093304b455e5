"""The runs of a comparison as tasks of a Ray cluster: of this machine, or one that an address names.

Each job is one task, and runs that train together are one job. Ray starts a task where resources are free. If its
worker is lost, Ray starts the task again, and the run resumes from its last checkpoint, if one exists. The inputs and
outputs of a task are files, so all machines of a cluster need the same folders: of the runs, of the data, and of a
model unless it is a name on the Hub. Only settings are sent to workers, and only the results of runs are sent back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peftcore.errors import BadInput, TrainingError
from peftcore_lab.comparisons.comparison import Comparison
from peftcore_lab.comparisons.running import Board, Finding, Job, Result, carry_out, forget
from peftcore_lab.training.cluster import Cluster, Silent, go_to, taken
from peftcore_lab.training.fleet_runs import Saved


class OnRay(Cluster):
    """A Ray cluster that executes the runs of a comparison."""

    def results(
        self, comparison: Comparison, jobs: Sequence[Job], board: Board, saved: list[Saved], resume: bool
    ) -> Iterator[Finding]:
        import ray

        if not resume:
            forget(comparison, jobs)
        settings, here = comparison.model_dump(mode="json"), str(Path.cwd())
        with self.connected():
            task = self.task(_job)
            waiting = {task.remote(settings, job, here): job for job in jobs}
            board.begin(f"{len(jobs)} on Ray")
            while waiting:
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                job = waiting.pop(done)
                results, found = _taken(done, job)
                saved.extend(found)
                _check_shared(comparison, results)
                yield from ((each, job.seed, result) for each, result in zip(job.candidates, results, strict=True))


def _job(settings: dict[str, Any], job: Job, here: str) -> tuple[list[Result], list[Saved]]:
    """Execute one job in a process of the cluster, in the working directory of the process that started the comparison.

    Raises:
        BadInput: this directory does not exist on the machine, or a model, data or option of the comparison cannot be
            used there.
    """
    go_to(here)
    saved: list[Saved] = []
    results = carry_out(Comparison.model_validate(settings), job, Silent(), saved, resume=True)
    return results, saved


def _taken(done: Any, job: Job) -> tuple[list[Result], list[Saved]]:
    try:
        results, saved = taken(done)
    except TrainingError as error:
        return [error] * len(job.candidates), []
    return results, saved


def _check_shared(comparison: Comparison, results: list[Result]) -> None:
    """Check that the folders that workers wrote exist on this machine.

    Raises:
        BadInput: a folder does not exist here.
    """
    for each in results:
        if not isinstance(each, TrainingError) and not (comparison.out / each.trial.folder).exists():
            raise BadInput(
                f"{comparison.out / each.trial.folder} does not exist on this machine, because a worker wrote it on "
                "another one: set --out to a folder that all machines of the cluster share"
            )
