"""Peak memory of a call, from the allocator's own record: exact, and the same on every machine. And an allocator that
gives no memory back, so that no contender waits for pages that another one has let go."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak(call: Callable[[], object]) -> int:
    """Bytes that were held at once beyond what was held before, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def keep_memory() -> None:
    """Let glibc keep what is freed, and take no memory from the system for a tensor of up to 32 MB alone."""
    if sys.platform == "linux":
        set_option = ctypes.CDLL(None).mallopt
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        set_option(M_TRIM_THRESHOLD, 2**31 - 1)
        set_option(M_MMAP_THRESHOLD, 2**25)
