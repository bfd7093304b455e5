"""The factors of mixtures of low-rank updates, and their initialization."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peftcore.author import Site


def factors(site: Site, A: tuple[int, ...], B: tuple[int, ...], inputs: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return two factors of the given shapes, exactly one of which is initialized to zero. The shape of A is given
    without the kernel.

    A is uniform in +-1/sqrt(inputs * kernel) and B zero; for embeddings A is zero and B ~ N(0, 1), since an input picks
    a single column of A.
    """
    first, second = nn.Parameter(torch.zeros(*A, *site.kernel)), nn.Parameter(torch.zeros(*B))
    if site.layer.one_hot:
        nn.init.normal_(second)
    else:
        bound = 1 / math.sqrt(inputs * math.prod(site.kernel))
        nn.init.uniform_(first, -bound, bound)
    return first, second


def blocks(parts: Tensor) -> Tensor:
    """Return a block-diagonal tensor ``[n * a, n * b, ...]`` with the parts ``[n, a, b, ...]`` as its diagonal
    blocks."""
    n = len(parts)
    eye = torch.eye(n, dtype=parts.dtype, device=parts.device).view(n, 1, n, 1, *[1] * (parts.dim() - 3))
    return (eye * parts.unsqueeze(2)).flatten(2, 3).flatten(0, 1)


def joined(common: Tensor, own: Tensor | None) -> Tensor:
    """Return the skills ``[splits, all, ...]``: first the common ones, then those of each task."""
    return common if own is None else torch.cat([common, own], 1)
