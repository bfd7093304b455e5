"""Dropout fused with the linear map that follows it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcore.layers.kernels.autograd import apply, runs_plain
from peftcore.utils.autocast import cast_operands

LEVELS = 2**16
"""Probabilities are rounded to multiples of ``1 / LEVELS``: 64 random bits are split into four draws."""


def plain_dropped_linear(x: Tensor, weight: Tensor, probability: float) -> Tensor:
    """Returns ``weight dropout(x)``."""
    return F.linear(F.dropout(x, probability), weight)


def dropped_linear(x: Tensor, weight: Tensor, probability: float) -> Tensor:
    """Returns ``weight dropout(x)`` for x ``[..., in]`` and a weight ``[out, in]`` with few outputs. For backward, a
    mask of one byte per value is saved instead of a copy of the input. Drawing random numbers takes a tenth of the time
    of torch's dropout. Under autocast, the result has the dtype of autocast.
    """
    if runs_plain(x) or probability == 1:
        return plain_dropped_linear(x, weight, probability)
    mask, scale = dropout_mask(x, probability)
    x, weight, _ = cast_operands(x, weight)
    return apply(_MaskedLinear, x, weight * scale, mask)


def dropout_mask(like: Tensor, probability: float) -> tuple[Tensor, float]:
    """Returns the mask of values that dropout keeps [bool, the shape of `like`], and the factor by which it scales
    them."""
    if _by_modes():
        kept = torch.empty(like.shape, dtype=torch.bool, device=like.device)
        return kept.bernoulli_(1 - probability), 1 / (1 - probability)
    count, level = like.numel(), round(probability * LEVELS)
    draws = _bits(-(-count // 4), like.device).view(torch.int16)[:count].view(like.shape)
    return draws >= level - LEVELS // 2, LEVELS / (LEVELS - level)


def _by_modes() -> bool:
    """Whether a dispatch mode of torch is active. Such a mode may draw a number for each entry by the entry's position,
    which is impossible if four entries share one random word."""
    return not torch.compiler.is_compiling() and bool(torch._C._len_torch_dispatch_stack())


def _bits(words: int, device: torch.device) -> Tensor:
    """Returns 64 random bits in each word."""
    if torch.compiler.is_compiling():  # no `random_` there, and its replacement never draws the largest word
        return torch.randint(-(2**63), 2**63 - 1, (words,), dtype=torch.int64, device=device)
    return torch.empty(words, dtype=torch.int64, device=device).random_(-(2**63), None)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, mask)
        return F.linear(masked(x, mask), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, mask = ctx.saved_tensors
        (gradient,) = gradients
        of_x = masked(gradient @ weight, mask) if ctx.needs_input_grad[0] else None
        of_weight = None if x is None else gradient.flatten(0, -2).mT @ masked(x, mask).flatten(0, -2)
        return of_x, of_weight, None


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Returns `x` with zeros for dropped values. `torch.where` would take 1.5 times as long."""
    return mask.to(x.dtype).mul_(x)
