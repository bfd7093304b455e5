"""The values that remain after pruning: one vector, and their positions before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import Checked


class Kept(Checked):
    """The weights that stay, and their places in all adapters one after the other, ascending."""

    index: Tensor

    def __init__(self, total: int, count: int) -> None:
        super().__init__()
        self.total = total
        self.values = nn.Parameter(torch.zeros(count))
        self.register_buffer("index", torch.randperm(total)[:count].sort().values.to(torch.int32))

    @torch.no_grad()
    def take(self, start: Tensor, score: Tensor | None = None) -> None:
        """Take the starts of the weights that stay: those with the highest scores, or those that were drawn."""
        start = start.to(self.values)
        if score is not None:
            self.index.copy_(score.topk(len(self.index)).indices.sort().values)
        self.values.copy_(start[self.index.long()])

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        index = values.get("index")
        if index is not None and not (index.diff().gt(0).all() and int(index[0]) >= 0 and int(index[-1]) < self.total):
            yield f"index does not hold ascending places in {self.total} weights"

    def between(self, first: int, size: int, device: torch.device) -> Tensor:
        """Return `size` of all weights, from the first on, with zeros where they were pruned."""
        values, index = (each.to(device) for each in (self.values, self.index))
        # How many places lie here is only known on the device, but not more than this; the rest go behind the end.
        order = torch.searchsorted(index, first) + torch.arange(min(len(index), size), device=device)
        found = order.clamp(max=len(index) - 1)
        place = index[found].long() - first
        place = torch.where((order < len(index)) & (place < size), place, size)
        return values.new_zeros(size + 1).scatter(0, place, values[found])[:size]


def drawn(width: int, config: Any) -> Tensor:
    """Draw both matrices of an adapter, flat, W_down first."""
    stds = (config.init_std, config.up_init_std)
    return torch.cat([torch.randn(width * config.bottleneck) * std for std in stds])
