"""Numbers that are the same everywhere: sines, as scripts beside frozen numbers have them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def wave(shape: Sequence[int], k: float) -> Tensor:
    """Return sin(k), sin(2 k), sin(3 k), ... in a shape, in float64."""
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * k + k).view(tuple(shape))


@torch.no_grad()
def waves(tensors: Mapping[str, Tensor], start: float) -> None:
    """Fill tensors by alphabet, each with another wave."""
    for index, name in enumerate(sorted(tensors)):
        tensors[name].copy_(0.5 * wave(tensors[name].shape, start + 0.37 * index))
