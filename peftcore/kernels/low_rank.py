"""A linear layer and a low-rank update of it, in one function: the update is added where the output stands, and in
backward its part of the input's gradient where that of the layer stands, instead of going through memory once more each
time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcore.kernels.autograd import apply, is_plain, operands
from peftcore.kernels.dropout import dropped_linear, keep, masked
from peftcore.kernels.projections import projected

FEW = 64
"""Up to so many columns of a product are made as rows."""


def plain_low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """``weight x + bias + scale B A dropout(x)``."""
    low = F.linear(F.dropout(x, dropout) if dropout else x, A)
    return F.linear(x, weight, bias) + F.linear(low * scale, B)


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """`plain_low_rank_linear` of a frozen weight."""
    x, weight, bias, (A, B) = _in_one_dtype(x, weight, bias, A, B)
    if is_plain(x) or (dropout and dropout == 1):  # a default is a symbol where shapes are, and not to be compared
        return plain_low_rank_linear(x, weight, bias, A, B, scale, dropout)
    if torch.compiler.is_compiling():
        B, scale = B * scale, 1.0  # see `Linear.add`
    A, kept = _dropping(x, A, dropout)
    return apply(_LowRankLinear, x, weight, bias, A, B, scale, kept)[0]


def _in_one_dtype(
    x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """All in the dtype in which the layer computes."""
    x, weight, bias = operands(x, weight, bias)
    return x, weight, bias, [each.to(weight.dtype) for each in others]


def _dropping(x: Tensor, A: Tensor, dropout: float) -> tuple[Tensor, Tensor | None]:
    """A as large as makes up for what is dropped, and what is kept of the rows of x."""
    if not dropout:
        return A, None
    kept, more = keep(x, dropout)
    return A * more, kept.view(-1, x.shape[-1])


class _LowRankLinear(torch.autograd.Function):
    """Returns what it keeps for backward as well, so that backward can be differentiated without keeping more: the
    input is kept for A alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, kept: Any
    ) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        low = F.linear(rows if kept is None else masked(rows, kept), A)
        y = F.linear(x, weight, bias)  # to the bit what the layer returns by itself, whatever the strides of x
        y.view(-1, weight.shape[0]).addmm_(low, B.mT, alpha=scale)
        back, _, _, trains_A, trains_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if trains_A else None, weight, A if back else None, B, low if trains_B else None, kept)
        ctx.scale, ctx.shape = scale, x.shape
        ctx.set_materialize_grads(False)
        return y, low

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, A, B, low, kept = ctx.saved_tensors
        of_y, of_low_too = gradients
        gradient = _rows_of(of_y, ctx.shape, weight)
        of_low = narrow(gradient, B.mT).mul_(ctx.scale)
        if of_low_too is not None:
            of_low = of_low + of_low_too
        of_x = of_A = of_B = None
        if ctx.needs_input_grad[0]:
            of_x = _through(gradient, weight, of_low, A, kept).view(ctx.shape)
        if x is not None:
            rows = x.reshape(-1, x.shape[-1])
            of_A = of_low.mT @ (rows if kept is None else masked(rows, kept))
        if low is not None:
            of_B = narrow(gradient.mT, low.mT).mul_(ctx.scale)
        return of_x, None, None, of_A, of_B, None, None


def _rows_of(gradient: Tensor | None, shape: torch.Size, weight: Tensor) -> Tensor:
    """The gradient of the output by rows, for an input of a shape; none is of zeros."""
    if gradient is None:  # backward is being differentiated, and nothing comes by this way
        gradient = weight.new_zeros(*shape[:-1], weight.shape[0])
    return gradient.reshape(-1, weight.shape[0])


def narrow(wide: Tensor, few: Tensor) -> Tensor:
    """``wide few^T``, made as its transpose if it has few columns: on a CPU narrow takes two to ten times as long as
    flat."""
    return (few @ wide.mT).mT if few.shape[0] <= FEW else F.linear(wide, few)


def _through(gradient: Tensor, weight: Tensor, of_low: Tensor, A: Tensor, kept: Tensor | None) -> Tensor:
    """The gradient of the rows that went in, through the layer and through the update."""
    of_rows = gradient @ weight
    return of_rows.addmm_(of_low, A) if kept is None else of_rows.addcmul_(of_low @ A, kept.to(of_rows.dtype))


# The same with matrices that are fixed, and vectors that scale them


class ScaledFactors(NamedTuple):
    """Of the update ``diag(outer) B diag(inner) A``: the vectors train, the matrices do not."""

    A: Tensor
    """``[rank, in, *kernel]``."""
    inner: Tensor
    """``[rank]``."""
    B: Tensor
    """``[out, rank]``."""
    outer: Tensor
    """``[out]``."""


def plain_scaled_low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: ScaledFactors, dropout: float = 0.0
) -> Tensor:
    """``weight x + bias + diag(outer) B diag(inner) A dropout(x)``."""
    A, inner, B, outer = factors
    low = F.linear(F.dropout(x, dropout) if dropout else x, A)
    return F.linear(x, weight, bias) + outer * F.linear(inner * low, B)


def scaled_low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: ScaledFactors, dropout: float = 0.0
) -> Tensor:
    """`plain_scaled_low_rank_linear`, in one function unless the matrices train. Sites that share x and A share their
    product, unless parts of x are dropped."""
    given, (A, inner, B, outer) = x, factors
    x, weight, bias, cast = _in_one_dtype(x, weight, bias, inner, B, outer)
    if is_plain() or dropout == 1 or A.requires_grad or B.requires_grad:
        return plain_scaled_low_rank_linear(x, weight, bias, ScaledFactors(A.to(x.dtype), *cast), dropout)
    low = dropped_linear(x, A.to(x.dtype), dropout) if dropout else projected(given, A, x.dtype)
    return apply(_ScaledLowRankLinear, x, low, weight, bias, *cast)[0]


class _ScaledLowRankLinear(torch.autograd.Function):
    """Returns what it keeps for backward as well, so that backward can be differentiated."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None, inner: Tensor, B: Tensor, outer: Tensor
    ) -> tuple[Tensor, Tensor]:
        mixed = F.linear(low.reshape(-1, low.shape[-1]) * inner, B)
        y = F.linear(x, weight, bias)
        y.view(mixed.shape).addcmul_(outer, mixed)
        ctx.save_for_backward(low, weight, inner, B, outer, mixed)
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return y, mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        low, weight, inner, B, outer, mixed = ctx.saved_tensors
        of_y, of_mixed_too = gradients
        gradient = _rows_of(of_y, ctx.shape, weight)
        of_scaled = narrow(gradient, (outer.unsqueeze(-1) * B).mT)  # of low * inner
        if of_mixed_too is not None:
            of_scaled = of_scaled + of_mixed_too @ B
        of_x = (gradient @ weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        of_low = (of_scaled * inner).view(low.shape) if ctx.needs_input_grad[1] else None
        of_inner = (of_scaled * low.reshape(-1, low.shape[-1])).sum(0)
        return of_x, of_low, None, None, of_inner, None, (gradient * mixed).sum(0)
