"""A linear layer with an update of fixed low-rank matrices and trained vectors, as one autograd function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcore.author import Layer, cast_operands, dropped_linear, matmul_transposed, runs_plain
from peftcore_reparameterized._kernels.projections import projected
from peftcore_reparameterized._kernels.scaling import add_scaled


class ScaledFactors(NamedTuple):
    """Factors of the update ``diag(outer) B diag(inner) A``: the vectors train, the matrices do not."""

    A: Tensor
    """``[rank, in, *kernel]``."""
    inner: Tensor
    """``[rank]``."""
    B: Tensor
    """``[out, rank]``."""
    outer: Tensor
    """``[out]``."""


def scaled_update(
    layer: Layer, call: Callable[..., Tensor], x: Tensor, factors: ScaledFactors, dropout: float = 0.0
) -> Tensor:
    """Return ``call(x) + diag(outer) B diag(inner) A dropout(x)``, where `call` is the inner layer of an operator.

    Args:
        layer: the layer of the site.
        x: the input of the layer, ``[..., in]`` of a linear layer.
        factors: the factors of the update, of any dtype.
        dropout: the probability with which parts of x are dropped for the update.
    """
    own = layer.frozen_linear(call, x, len(factors.B))
    if own is not None:
        return scaled_low_rank_linear(x, *own, factors, dropout)
    y = call(x)
    A, inner, B, outer = (each.to(y.dtype) for each in factors)
    low = layer.along_channels(inner, y) * layer.apply_dropped(x, A, dropout)
    return add_scaled(y, layer.along_channels(outer, y), layer.mix(low, B))


def plain_scaled_low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: ScaledFactors, dropout: float = 0.0
) -> Tensor:
    """Compute ``weight x + bias + diag(outer) B diag(inner) A dropout(x)``."""
    A, inner, B, outer = factors
    low = F.linear(F.dropout(x, dropout) if dropout else x, A)
    return F.linear(x, weight, bias) + outer * F.linear(inner * low, B)


def scaled_low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: ScaledFactors, dropout: float = 0.0
) -> Tensor:
    """Compute `plain_scaled_low_rank_linear` as one autograd function, unless the matrices train. Sites with the same x
    and A share the product ``A x``, unless parts of x are dropped."""
    given, (A, inner, B, outer) = x, factors
    x, weight, bias = cast_operands(x, weight, bias)
    cast = [each.to(weight.dtype) for each in (inner, B, outer)]
    if runs_plain() or dropout == 1 or A.requires_grad or B.requires_grad:
        return plain_scaled_low_rank_linear(x, weight, bias, ScaledFactors(A.to(x.dtype), *cast), dropout)
    low = dropped_linear(x, A.to(x.dtype), dropout) if dropout else projected(given, A, x.dtype)
    return _ScaledLowRankLinear.apply(x, low, weight, bias, *cast)[0]


class _ScaledLowRankLinear(torch.autograd.Function):
    """The autograd function of `scaled_low_rank_linear`; it returns what it saves for backward as well, so that
    backward can be differentiated."""

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
        if of_y is None:  # backward is being differentiated, and nothing comes by this way
            of_y = weight.new_zeros(*ctx.shape[:-1], weight.shape[0])
        gradient = of_y.reshape(-1, weight.shape[0])
        of_scaled = matmul_transposed(gradient, (outer.unsqueeze(-1) * B).mT)  # of low * inner
        if of_mixed_too is not None:
            of_scaled = of_scaled + of_mixed_too @ B
        of_x = (gradient @ weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        of_low = (of_scaled * inner).view(low.shape) if ctx.needs_input_grad[1] else None
        of_inner = (of_scaled * low.reshape(-1, low.shape[-1])).sum(0)
        return of_x, of_low, None, None, of_inner, None, (gradient * mixed).sum(0)
