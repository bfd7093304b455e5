"""Checks that new tensors fit into the memory of their devices, before any of them is allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from peftcore.errors import MemoryLimit
from peftcore.utils.numbers import size


def free_bytes(device: torch.device) -> int | None:
    """Returns how many bytes can still be allocated on a device; None where that is not known.

    On CUDA devices the blocks count as free that torch has cached. The memory of a CPU is shared with other processes,
    and the system can swap: no number there is certain.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def totals(sizes: Iterable[tuple[torch.device, int]]) -> Mapping[torch.device, int]:
    """Returns the bytes on each device."""
    found: Counter[torch.device] = Counter()
    for device, count in sizes:
        found[device] += count
    return found


def check_room(needed: Mapping[torch.device, int], what: str, advice: str) -> None:
    """Check that bytes which are certainly needed are free. What an operation needs in passing is not counted, so the
    allocator may still fail.

    Raises:
        MemoryLimit: a device has too little free memory.
    """
    for device, count in needed.items():
        free = free_bytes(device)
        if free is not None and count > free:
            raise MemoryLimit(
                f"{what} needs at least {count:,} bytes ({size(count)}) of {device}, and {free:,} ({size(free)}) are "
                f"free; nothing was changed. {advice}"
            )
