"""A Ray cluster of this machine for tests, and its workers as processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import psutil
import pytest


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Of two workers; as long as the tests of a module last."""
    ray = pytest.importorskip("ray")
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    except Exception as error:
        pytest.skip(f"Ray does not start on this machine: {error}")
    yield
    ray.shutdown()


class Kills(Thread):
    """Kills a worker as soon as its run has a checkpoint, once. It is halted first, so that it is not at the next one
    when its last one is looked up."""

    def __init__(self, runs: Path, pattern: str, called: str) -> None:
        super().__init__(daemon=True)
        self.runs, self.pattern, self.called = runs, pattern, called
        self.checkpoint, self.written = runs, 0

    def run(self) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and not self.written:
            for run in {done.parents[2] for done in self._complete(self.runs, self.pattern)}:
                for worker in psutil.process_iter(["cmdline"]):
                    if self.called in " ".join(worker.info["cmdline"] or []) and str(run) in opened(worker):
                        with suppress(psutil.NoSuchProcess):
                            self._kill(worker, run)
            time.sleep(0.002)

    def _kill(self, worker: psutil.Process, run: Path) -> None:
        worker.suspend()
        self.checkpoint = max(self._complete(run, ""), key=lambda done: done.stat().st_mtime_ns)
        self.written = self.checkpoint.stat().st_mtime_ns
        worker.kill()

    @staticmethod
    def _complete(folder: Path, pattern: str) -> list[Path]:
        return [*folder.glob(f"{pattern}checkpoints/checkpoint-*/complete")]

    def assert_went_on(self) -> None:
        """Check that a worker was killed, and that nothing before the checkpoint was trained again."""
        self.join(1)
        assert self.written, "no worker was killed"
        assert self.checkpoint.stat().st_mtime_ns == self.written, "it began anew"


def opened(worker: psutil.Process) -> str:
    """Return the files that a worker has open, its run's log among them."""
    try:
        return " ".join(each.path for each in worker.open_files())
    except psutil.Error:
        return ""
