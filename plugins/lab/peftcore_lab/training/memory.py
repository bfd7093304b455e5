"""Memory of a run: how much it takes at its peak, for this process alone, and whether an error says that there is too
little.

On a CPU: the resident set of the process, sampled every few milliseconds, above what it held when the run began.
Garbage is collected and free pages go back to the system first, so that every run is measured from the same ground.
On a CUDA device: the allocator's own peak.
"""

from __future__ import annotations

import ctypes
import gc
import threading

import psutil
import torch

INTERVAL = 0.005


class PeakMemory:
    """Context manager; ``peak`` holds the bytes afterwards."""

    def __init__(self) -> None:
        self.peak = 0
        self._process = psutil.Process()
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        release()
        self._start = self._highest = self._process.memory_info().rss
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._sampler.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._sampler.join()
        cuda = torch.cuda.is_available()
        self.peak = torch.cuda.max_memory_allocated() if cuda else self._highest - self._start

    def _sample(self) -> None:
        while not self._done.wait(INTERVAL):
            self._highest = max(self._highest, self._process.memory_info().rss)


def is_full(error: BaseException) -> bool:
    """Return whether an error says that there is not enough memory."""
    # Torch has no class for it on a CPU.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def release() -> None:
    """Collect garbage; where the C library can (glibc), hand free pages back: they would hide the next run's growth."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
