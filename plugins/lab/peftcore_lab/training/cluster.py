"""Ray clusters: tasks that are restarted if their worker is lost, and training in several processes of a cluster.

Ray Train starts the processes of a training and their process group, and restarts all of them if one is lost.
Everything else is done by accelerate and the Trainer, as under torchrun.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftcore.errors import BadInput, PeftcoreError, TrainingError
from peftcore.utils.packages import require
from peftcore_lab.runs.folder import RUN, holds
from peftcore_lab.runs.run import Run
from peftcore_lab.training.train import Outcome, train

RETRIES = 3
"""How often a job is restarted after its worker was lost."""


class Cluster:
    """A Ray cluster.

    Args:
        address: the address of the cluster, ``10.0.0.1:6379`` or ``auto``. None starts a temporary cluster on this
            machine.
        cpus: the number of CPUs of a run.
        gpus: the number of GPUs of a run, or a share of one GPU. Runs use CPUs if the cluster lacks GPUs.

    Raises:
        MissingPackage: Ray is not installed.
        BadInput: a cluster cannot be reached at the address.
    """

    def __init__(self, address: str | None = None, cpus: float = 1.0, gpus: float = 1.0) -> None:
        require({"ray": "peftcore[ray]"})
        self.address, self.cpus, self.gpus = address, cpus, gpus

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Context manager in which tasks can be started on the cluster."""
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
        """Return a function as a Ray task with the resources of one run. The task is restarted if its worker is
        lost."""
        import ray

        gpus = self.gpus if _has().get("GPU") else 0
        return ray.remote(function).options(num_cpus=self.cpus, num_gpus=gpus, max_retries=RETRIES)

    @property
    def room(self) -> int:
        """Return how many runs can run at once."""
        has = _has()
        return max(1, int(has["GPU"] / self.gpus if has.get("GPU") else has.get("CPU", 1) / self.cpus))

    def train(self, run: Run, processes: int, resume: bool = False) -> Outcome:
        """Train a run in several processes, as ``torchrun`` would, and return its outcome. If a process is lost, all
        continue from the last checkpoint.

        Raises:
            BadInput: a model, data or option of the run cannot be used there, or its folder is not shared.
            TrainingError: training failed, or processes were lost more often than they are restarted.
        """
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        if not resume and (run.out / RUN).exists():  # now, and not in processes that would begin again
            raise BadInput(
                f"{run.out} holds a run already: add --resume to continue it, or set --out to another folder"
            )
        told = {"run": run.model_dump(mode="json"), "here": str(Path.cwd()), "resume": resume}
        folder = run.out.resolve() / "ray"
        with self.connected():
            gpus = bool(_has().get("GPU"))
            scaling = ScalingConfig(num_workers=processes, use_gpu=gpus, resources_per_worker={"CPU": self.cpus})
            failing = FailureConfig(max_failures=RETRIES)
            settings = RunConfig(name="train", storage_path=str(folder), failure_config=failing)
            try:
                TorchTrainer(_process, train_loop_config=told, scaling_config=scaling, run_config=settings).fit()
            except Exception as error:
                raise _reason(error) from error
        try:
            return Outcome(**json.loads((run.out / "metrics.json").read_text(encoding="utf-8")))
        except OSError:
            raise BadInput(
                f"{run.out / 'metrics.json'} does not exist on this machine, because it was written on another one: "
                "set --out to a folder that all machines of the cluster share"
            ) from None


def _process(told: dict[str, Any]) -> None:
    """Train in one of several processes. A restarted process resumes the run."""
    go_to(told["here"])
    run = Run.model_validate(told["run"])
    train(run, Silent(), told["resume"] or holds(run))


def _reason(error: BaseException) -> Exception:
    """Return the original error of a process, extracted from the error that Ray Train raises."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, PeftcoreError):
            return found
        inside = [getattr(found, "cause", None), found.__cause__, *getattr(found, "worker_failures", {}).values()]
        found = next((each for each in inside if isinstance(each, BaseException) and each is not found), None)
    return TrainingError(f"training on Ray stopped: {' '.join(str(error).split())[:500]}")


def go_to(folder: str) -> None:
    """Change to the working directory of the calling process, so that relative file names are valid.

    Raises:
        BadInput: the folder does not exist on this machine.
    """
    try:
        os.chdir(folder)
    except OSError:
        raise BadInput(
            f"{folder} does not exist on every machine of the cluster: start in a folder that all machines share"
        ) from None


def taken(done: Any) -> Any:
    """Return the result of a task.

    Raises:
        BadInput: the task cannot run on its worker.
        TrainingError: its worker was lost, and so were all retries.
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
        raise TrainingError(f"its worker was lost, and so were {RETRIES} retries: {reason}") from error


def _has() -> dict[str, float]:
    """Returns the resources of the cluster, by Ray's names (``CPU``, ``GPU``)."""
    import ray

    found: dict[str, float] = ray.cluster_resources()
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
    """Check that a server listens at an address, since Ray would try to connect for minutes."""
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise BadInput(f"no Ray cluster at {address}: {error}") from None


class Silent:
    """A display that shows nothing, since the dashboard of the cluster shows the steps of each task."""

    def begin(self, label: str) -> None: ...

    def finish(self, line: str) -> None: ...

    def phase(self, name: str, total: int | None) -> None: ...

    def advance(self) -> None: ...

    def say(self, line: str) -> None: ...
