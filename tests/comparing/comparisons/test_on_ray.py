"""On a Ray cluster of this machine, with two workers, runs come to what they come to here; a worker that is killed in
the middle of a run loses what came after its last checkpoint, and nothing else."""

import time
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
from comparisons import found
from silent import Silent

from peftcore.comparing.comparisons.compare import compare
from peftcore.comparing.comparisons.comparison import Comparison
from peftcore.comparing.comparisons.on_ray import OnRay, _taken
from peftcore.comparing.comparisons.running import Job
from peftcore.comparing.errors import BadInput
from peftcore.errors import TrainingError

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Any:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Kills(Thread):
    """Kills the worker of a run as soon as the run has a checkpoint, once."""

    def __init__(self, runs: Path) -> None:
        super().__init__(daemon=True)
        self.runs, self.written = runs, 0
        self.checkpoint = runs

    def run(self) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            for done in self.runs.glob("*/checkpoints/checkpoint-20/complete"):
                for worker in psutil.process_iter(["cmdline"]):
                    if "ray::_job" in " ".join(worker.info["cmdline"] or []) and str(done.parents[2]) in opened(worker):
                        self.checkpoint, self.written = done, done.stat().st_mtime_ns
                        worker.kill()
                        return
            time.sleep(0.002)


def opened(worker: psutil.Process) -> str:
    """The files that a worker has open, its run's log among them."""
    try:
        return " ".join(each.path for each in worker.open_files())
    except psutil.Error:
        return ""


def test_runs_come_to_the_same_and_one_that_is_killed_goes_on(comparison: Comparison) -> None:
    training = comparison.training.model_copy(update={"steps": 45, "evaluate_every": 20})
    comparison = comparison.model_copy(update={"training": training})
    alone = compare(comparison.model_copy(update={"out": comparison.out / "here"}), Silent())
    watch = Kills(comparison.out / "runs")
    watch.start()
    report = compare(comparison, Silent(), place=OnRay())
    watch.join(1)
    assert watch.written, "no worker was killed"
    assert watch.checkpoint.stat().st_mtime_ns == watch.written, "it began anew"
    assert found(report) == found(alone)
    assert not report.failed


def test_what_a_task_says_is_said_here(comparison: Comparison) -> None:
    job = Job((comparison.methods[0],), 0)

    @ray.remote(max_retries=0)
    def refused() -> None:
        raise BadInput("no column label")

    with pytest.raises(BadInput, match="no column label"):
        _taken(refused.remote(), job)

    @ray.remote(max_retries=0)
    def dies() -> None:
        psutil.Process().kill()

    (lost,), _ = _taken(dies.remote(), job)
    assert isinstance(lost, TrainingError) and "its worker was lost" in str(lost)


def test_a_cluster_that_is_not_there(comparison: Comparison) -> None:
    ray.shutdown()
    with pytest.raises(BadInput, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        compare(comparison, Silent(), place=OnRay("127.0.0.1:1"))
