"""One adapter of a chain in parallel with the model, and the linear layer that reads the last states of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from peftcore_additive._side import PostNormBlock

STD = 0.0002
"""Deviation of the start of both projections."""


class Adapter(nn.Module):
    """One adapter of a chain."""

    def __init__(self, features: int, config: Any) -> None:
        super().__init__()
        width = config.width or max(1, 3 * features // 4)
        self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        self.blocks = nn.ModuleList(PostNormBlock(width, config.heads, config.dropout) for _ in range(config.depth))
        for projection in (self.down, self.up):
            nn.init.normal_(projection.weight, std=STD)
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor, visible: Tensor, caches: Sequence[Any]) -> Tensor:
        """Map ``[batch, tokens, d]`` to the same shape; each block has a layer of a cache, where there is one."""
        z = self.down(x)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            z = block(z, visible, cache)
        return x + self.up(z)


def joint(features: int, identity: bool) -> nn.Linear:
    """Make the linear layer that reads the last states of the model and of the chain."""
    made = nn.Linear(2 * features, features)
    if identity:
        nn.init.eye_(made.weight)
        nn.init.zeros_(made.bias)
    return made
