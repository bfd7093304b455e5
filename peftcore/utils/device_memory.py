"""Checks that new tensors fit into the memory of their devices, before any of them is allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from peftcore.errors import MemoryLimit


def free_bytes(device: torch.device) -> int | None:
    """Returns the number of bytes that can still be allocated on a device; None if it is unknown.

    On CUDA devices, unused blocks in torch's cache count as free. The result is None for a CPU, since its memory is
    shared with other processes and the system can swap.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def totals(sizes: Iterable[tuple[torch.device, int]]) -> Mapping[torch.device, int]:
    """Returns the sum of the sizes on each device, in bytes."""
    found: Counter[torch.device] = Counter()
    for device, count in sizes:
        found[device] += count
    return found


def check_room(needed: Mapping[torch.device, int], what: str, advice: str) -> None:
    """Check that each device has the needed bytes free. Temporary memory of operations is not counted, so an allocation
    may still fail.

    Raises:
        MemoryLimit: a device has too little free memory.
    """
    for device, count in needed.items():
        free = free_bytes(device)
        if free is not None and count > free:
            raise MemoryLimit(
                f"{what} needs at least {count:,} bytes of {device}, and {free:,} are free; "
                f"nothing was changed. {advice}"
            )
