"""Grouped matrices as whole ones."""

from __future__ import annotations

import torch
from torch import Tensor


def written_out(G: Tensor, groups: int, batch: int, reorder: bool) -> Tensor:
    """Return the matrices ``[*batch, out, in, *kernel]`` of blocks ``[*batch, out, in/g, *kernel]``, with `batch`
    leading dimensions; with `reorder` of inputs that are dealt to the groups one after the other."""
    own = G.unflatten(batch, (groups, -1)).unsqueeze(batch + 2)  # [*batch, g, out/g, 1, in/g, *kernel]
    same = torch.eye(groups, dtype=G.dtype, device=G.device)
    whole = own * same.view(groups, 1, groups, *[1] * (own.dim() - batch - 3))
    whole = whole.flatten(batch, batch + 1).flatten(batch + 1, batch + 2)
    if not reorder:
        return whole
    return whole.unflatten(batch + 1, (-1, groups)).transpose(batch + 1, batch + 2).flatten(batch + 1, batch + 2)
