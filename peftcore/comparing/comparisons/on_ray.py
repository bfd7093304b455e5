"""The runs of a comparison as tasks of a Ray cluster: of this machine, or one that an address names.

Each job is one task, and what trains together is one job. Ray starts it where there is room, and starts it again where
a worker is lost; then it goes on from the last checkpoint that is there. What a task writes and what it reads are
files, so all machines of a cluster need the same folders: of the runs, of the data, and of a model that is no name of
the Hub. Settings alone are sent to workers, and what a run came to is sent back.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftcore.comparing.comparisons.comparison import Comparison
from peftcore.comparing.comparisons.running import Board, Found, Job, Result, carry_out, forget
from peftcore.comparing.errors import BadInput
from peftcore.comparing.packages import require
from peftcore.comparing.training.together import Saved
from peftcore.errors import PeftcoreError, TrainingError

RETRIES = 3
"""How often a job is begun again whose worker was lost."""


class OnRay:
    """A Ray cluster.

    Args:
        address: where it is, ``10.0.0.1:6379`` or ``auto``; None starts one of this machine, for as long as this lasts.
        cpus: processors of a run.
        gpus: GPUs of a run, or a share of one; all run on processors where the cluster has none.

    Raises:
        MissingPackage: Ray is not installed.
        BadInput: there is no cluster at the address.
    """

    def __init__(self, address: str | None = None, cpus: float = 1.0, gpus: float = 1.0) -> None:
        require({"ray": "peftcore[ray]"})
        self.address, self.cpus, self.gpus = address, cpus, gpus

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Context manager within which tasks can be given to the cluster."""
        import ray

        began = not ray.is_initialized()
        try:
            if began:
                _connect(self.address)
            yield
        finally:
            if began:
                ray.shutdown()

    def task(self, function: Callable[..., Any]) -> Any:
        """Return a function as a task of one run's size, which begins again where its worker is lost."""
        import ray

        gpus = self.gpus if _has().get("GPU") else 0
        return ray.remote(function).options(num_cpus=self.cpus, num_gpus=gpus, max_retries=RETRIES)

    @property
    def room(self) -> int:
        """Return how many runs there is room for at once."""
        has = _has()
        return max(1, int(has["GPU"] / self.gpus if has.get("GPU") else has.get("CPU", 1) / self.cpus))

    def results(
        self, comparison: Comparison, jobs: Sequence[Job], board: Board, saved: list[Saved], resume: bool
    ) -> Iterator[Found]:
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
    """Carry out one job in a process of the cluster, in the folder of the one that asked for it.

    Raises:
        BadInput: there is no such folder on this machine, or what the comparison names cannot be used there.
    """
    go_to(here)
    saved: list[Saved] = []
    results = carry_out(Comparison.model_validate(settings), job, Silent(), saved, resume=True)
    return results, saved


def go_to(folder: str) -> None:
    """Change to the folder of the process that asked, in which names of files are meant.

    Raises:
        BadInput: there is none on this machine.
    """
    try:
        os.chdir(folder)
    except OSError:
        raise BadInput(f"{folder} is not on all machines of the cluster, which have to share it") from None


def taken(done: Any) -> Any:
    """Return what a task gave.

    Raises:
        BadInput: what it was told to do cannot be done there.
        TrainingError: its worker was lost, and so were those that began it again.
    """
    import ray

    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PeftcoreError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise TrainingError(f"its worker was lost, {RETRIES} times more after that: {reason}") from error


def _taken(done: Any, job: Job) -> tuple[list[Result], list[Saved]]:
    try:
        results, saved = taken(done)
    except TrainingError as error:
        return [error] * len(job.candidates), []
    return results, saved


def _has() -> dict[str, float]:
    """What the cluster has, by Ray's names."""
    import ray

    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def _connect(address: str | None) -> None:
    import ray

    _check_listens(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        quiet["include_dashboard"] = False
    try:
        ray.init(address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BadInput(f"no Ray cluster at {address or 'this machine'}: {str(error).splitlines()[0]}") from None


def _check_listens(address: str | None) -> None:
    """Check that somebody listens at an address: Ray would try for minutes."""
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise BadInput(f"no Ray cluster at {address}: {error}") from None


def _check_shared(comparison: Comparison, results: list[Result]) -> None:
    """Check that what a worker wrote is where it is looked for.

    Raises:
        BadInput: it is not.
    """
    for each in results:
        if not isinstance(each, TrainingError) and not (comparison.out / each.trial.folder).exists():
            raise BadInput(
                f"{comparison.out / each.trial.folder} is not here: a worker wrote it on another machine. --out has to "
                "name a folder that all machines of the cluster share"
            )


class Silent:
    """A display of nothing: the cluster's own pages have the steps of each task."""

    def begin(self, label: str) -> None: ...

    def finish(self, line: str) -> None: ...

    def phase(self, name: str, total: int | None) -> None: ...

    def advance(self) -> None: ...

    def say(self, line: str) -> None: ...
