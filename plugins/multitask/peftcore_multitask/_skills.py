"""The factors of mixtures of low-rank updates, and their start."""

from __future__ import annotations

import math

import torch
from torch import nn

from peftcore import Site


def factors(site: Site, A: tuple[int, ...], B: tuple[int, ...], inputs: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Make two factors of these shapes (A without the kernel), of which exactly one is zero.

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
