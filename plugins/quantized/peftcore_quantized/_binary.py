"""Matrices of a few bits that train: Jie et al. 2023, arXiv 2307.16867 (JieShibo/PETL-ViT, binary_adapter/utils.py).

    m = mean(w),  t = std(w),  u = (w - m) / (t + 1e-5),  w' = t c(u) + m,   c(u) the code nearest to u

c counts as the identity in backward; m and t do not count as constants. The codes are those of a normal distribution,
each the median of its cell, cells meeting halfway between codes: +-0.6745 for one bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 500
"""Number of steps by which the authors' code improves codes. Up to four bits they rest by then, eight by far not."""


@functools.cache
def normal_codes(bits: int) -> Tensor:
    """Return the ``2^bits`` codes, ascending, in float64."""
    codes = torch.zeros(2**bits, dtype=torch.float64, device="cpu")
    ends = codes.new_zeros(1), codes.new_ones(1)
    for _ in range(ROUNDS):
        below = torch.cat([ends[0], torch.special.ndtr((codes[1:] + codes[:-1]) / 2), ends[1]])
        codes = torch.special.ndtri((below[1:] + below[:-1]) / 2)
    return codes


def in_bits(weight: Tensor, levels: Sequence[float]) -> Tensor:
    """Round a matrix to its codes (of `normal_codes`), scaled by its mean and deviation; in float32 or better. Matrices
    of a stack have their own."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    deviation, mean = torch.std_mean(weight, (-2, -1), keepdim=True)
    unit = (weight - mean) / (deviation + 1e-5)
    codes = torch.tensor(levels, dtype=unit.dtype, device=unit.device)
    chosen = codes[torch.bucketize(unit.detach(), (codes[1:] + codes[:-1]) / 2)]
    return (unit + (chosen - unit).detach()) * deviation + mean
