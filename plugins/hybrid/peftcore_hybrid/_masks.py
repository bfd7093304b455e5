"""Masks of the largest scores, packed as bits; the gradient of a mask reaches all scores."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def largest(scores: Tensor, kept: float) -> Tensor:
    """Return a mask of the entries with the largest magnitude; the gradient passes to the magnitudes."""
    sizes = scores.abs()
    count = scores.numel() - int((1 - kept) * scores.numel())
    places = sizes.flatten().topk(count).indices
    mask = torch.zeros_like(sizes).flatten().scatter(0, places, 1.0).view_as(sizes)
    return mask + (sizes - sizes.detach())


def to_bits(mask: Tensor) -> Tensor:
    """Return a mask as bytes of eight entries each, the first one lowest."""
    flat = F.pad(mask.flatten() > 0.5, (0, -mask.numel() % 8)).view(-1, 8)
    return (flat.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def from_bits(stored: Tensor, shape: torch.Size) -> Tensor:
    """Return the mask, of bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=stored.device)
    return ((stored.unsqueeze(-1) >> shifts) & 1).flatten()[: shape.numel()].view(shape).bool()


class Prototype(nn.Module):
    """The two maps that layers share."""

    def __init__(self, width: int, config: Any) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, config.bottleneck), nn.Linear(config.bottleneck, width)
        for linear, std in ((self.down, config.init_std), (self.up, config.up_init_std)):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)
