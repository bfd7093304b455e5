"""Peak memory of a call, from the allocator's own count: exact, and the same on every machine. And an allocator that
gives no memory back, so that no contender waits for pages that another one has let go, and has it in large pages."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

HUGE_PAGES = "glibc.malloc.hugetlb=1"


def peak(call: Callable[[], object]) -> int:
    """Return the bytes that were held at once beyond what was held before, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def keep_memory() -> None:
    """Let glibc keep what is freed, and take no memory from the system for a tensor of up to 32 MB alone.

    First the program begins again with glibc asking for pages of 2 MB, which its environment alone can say: of small
    ones it is luck which of a contender's tensors drive each other out of the cache.
    """
    if sys.platform != "linux":
        return
    if HUGE_PAGES not in os.environ.get("GLIBC_TUNABLES", ""):
        tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), HUGE_PAGES)))
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": tunables})
    set_option = ctypes.CDLL(None).mallopt
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    set_option(M_TRIM_THRESHOLD, 2**31 - 1)
    set_option(M_MMAP_THRESHOLD, 2**25)
