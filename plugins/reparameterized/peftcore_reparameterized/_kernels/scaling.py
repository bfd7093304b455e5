"""Products of entries: a scaled term of a sum, and a shared matrix in many copies that are scaled from both sides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftcore.author import runs_plain


def plain_add_scaled(y: Tensor, gain: Tensor, z: Tensor) -> Tensor:
    """Compute ``y + gain z``, where `gain` is broadcast to z."""
    return y + gain * z


def add_scaled(y: Tensor, gain: Tensor, z: Tensor) -> Tensor:
    """Compute `plain_add_scaled` in one pass over memory. Backward takes one pass less than that of `torch.addcmul`."""
    return plain_add_scaled(y, gain, z) if runs_plain() else _AddScaled.apply(y, gain, z)


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(gain, z if ctx.needs_input_grad[1] else None)
        ctx.shape = y.shape
        return torch.addcmul(y, gain, z)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gain, z), (gradient,) = ctx.saved_tensors, gradients
        of_gain = (gradient * z).sum_to_size(gain.shape) if ctx.needs_input_grad[1] else None
        of_y = gradient.sum_to_size(ctx.shape) if ctx.needs_input_grad[0] else None
        return of_y, of_gain, gradient * gain if ctx.needs_input_grad[2] else None


# Fixed bases, scaled from both sides


def plain_scaled_bases(A: Tensor, L: Tensor, G: Tensor) -> Tensor:
    """Compute ``L[..., r, b] A[r, i] G[..., b, i]``: a matrix ``[rank, in]`` in as many scaled copies as there are
    bases."""
    return L.unsqueeze(-1) * A.unsqueeze(-2) * G.unsqueeze(-3)


def scaled_bases(A: Tensor, L: Tensor, G: Tensor) -> Tensor:
    """Compute `plain_scaled_bases` of a fixed A. Only A and the scales are saved for backward, which allocates one
    tensor of the result's size."""
    if runs_plain() or A.requires_grad:
        return plain_scaled_bases(A, L, G)
    return _ScaledBases.apply(A, L, G)


class _ScaledBases(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, L: Tensor, G: Tensor) -> Tensor:
        ctx.save_for_backward(A, L, G)
        return (L.unsqueeze(-1) * A.unsqueeze(-2)).mul_(G.unsqueeze(-3))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (A, L, G), (gradient,) = ctx.saved_tensors, gradients
        part = gradient * A.unsqueeze(-2)
        return None, torch.einsum("...rbi,...bi->...rb", part, G), torch.einsum("...rbi,...rb->...bi", part, L)
