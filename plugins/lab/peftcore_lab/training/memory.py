"""Measures the peak memory of a run in this process, and detects errors that mean that memory is full.

On a CPU, it is the increase of the process's resident set since the start of the run, sampled every few milliseconds.
Before the run, garbage is collected and free pages are returned to the system, so that earlier runs do not change the
result. On a CUDA device, it is the peak of torch's allocator.
"""

from __future__ import annotations

import ctypes
import gc
import threading

import psutil
import torch

INTERVAL = 0.005


class PeakMemory:
    """Context manager that measures peak memory; afterwards ``peak`` is the number of bytes."""

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
    """Return whether an error means that there is not enough memory."""
    # Torch has no class for it on a CPU.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def release() -> None:
    """Collect garbage, and return free pages to the system if the C library (glibc) can. Otherwise the next run could
    reuse them, and its memory would be underestimated."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
