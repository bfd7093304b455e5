"""Masks of the largest scores, whose gradient goes to all scores, and their bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def largest(scores: Tensor, kept: float) -> Tensor:
    """Return a mask of the entries that are largest in size; its gradient goes to the sizes."""
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
