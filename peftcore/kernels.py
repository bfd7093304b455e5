"""What several methods compute at every step, arranged for speed. Each stands for plain mathematics (`plain_*`), which
the tests hold it against, and which runs under torch.compile, torch.func and wherever autograd is not plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 2**16
"""Probabilities are multiples of one over this: four draws come from each 64 random bits."""


def transformed() -> bool:
    """True inside torch.func's grad, vmap and the like, which know neither saved-tensor hooks nor addresses."""
    return bool(torch._C._are_functorch_transforms_active())


def _plain() -> bool:
    return torch.compiler.is_compiling() or transformed()


# Rotation in blocks


def plain_rotate(x: Tensor, R: Tensor) -> Tensor:
    """Rows ``[n, blocks * size]`` times a block-diagonal matrix, its blocks ``[blocks, size, size]``; one block stands
    for all."""
    parts = x.view(len(x), -1, R.shape[-1])  # [n, blocks, size]
    return (parts.transpose(0, 1) @ R).transpose(0, 1).flatten(1)


def rotate(x: Tensor, R: Tensor) -> Tensor:
    """`plain_rotate`, whose product is written where it belongs: turning it round costs more than making it."""
    if _plain() or R.shape[0] == 1:
        return plain_rotate(x, R)
    turned: Tensor = _Rotate.apply(x, R)  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor) -> Tensor:
        ctx.save_for_backward(x, R)
        blocks, size, _ = R.shape
        out = x.new_empty(len(x), blocks, size)
        torch.bmm(x.view(-1, blocks, size).transpose(0, 1), R, out=out.transpose(0, 1))
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, R = ctx.saved_tensors
        (gradient,) = gradients
        gradient = gradient.contiguous()
        parts = (len(x), *R.shape[:2])
        of_x = rotate(gradient, R.mT) if ctx.needs_input_grad[0] else None
        of_R = (
            x.view(parts).permute(1, 2, 0) @ gradient.view(parts).transpose(0, 1) if ctx.needs_input_grad[1] else None
        )
        return of_x, of_R


# What is made of a few small values


def derived(function: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
    """``function(source)``, a tensor much larger than `source` that takes several steps of its size: backward keeps
    none of them, and takes the steps again."""
    if _plain() or not torch.is_grad_enabled():
        return function(source)
    result: Tensor = _Derived.apply(function, source)  # type: ignore[no-untyped-call]
    return result


class _Derived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(source)
        return function(source)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (source,), again = ctx.saved_tensors, torch.is_grad_enabled()
        with torch.enable_grad():
            made = ctx.function(source)
        return None, *torch.autograd.grad(made, source, gradients, create_graph=again)


# A projection of an input of which parts are dropped


def plain_dropped_linear(x: Tensor, weight: Tensor, probability: float) -> Tensor:
    """``weight dropout(x)``."""
    return F.linear(F.dropout(x, probability), weight)


def dropped_linear(x: Tensor, weight: Tensor, probability: float) -> Tensor:
    """`plain_dropped_linear` for a narrow weight: of what is dropped one byte a value is kept, no copy of the input,
    and its randomness costs a tenth."""
    if _plain() or probability == 1:
        return plain_dropped_linear(x, weight, probability)
    kept, scale = keep(x, probability)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    low: Tensor = _MaskedLinear.apply(x, weight * scale, kept)  # type: ignore[no-untyped-call]
    return low


def keep(like: Tensor, probability: float) -> tuple[Tensor, float]:
    """What dropout keeps [bool, the shape of `like`], and by how much it makes that larger."""
    count, level = like.numel(), round(probability * LEVELS)
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    draws = bits.view(torch.int16)[:count].view(like.shape)
    return draws >= level - LEVELS // 2, LEVELS / (LEVELS - level)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, kept)
        return F.linear(_masked(x, kept), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, kept = ctx.saved_tensors
        (gradient,) = gradients
        of_x = _masked(gradient @ weight, kept) if ctx.needs_input_grad[0] else None
        rows = gradient.flatten(0, -2)
        of_weight = rows.mT @ _masked(x, kept).flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None


def _masked(x: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, x, 0)
