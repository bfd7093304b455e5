"""A linear layer fused with a low-rank update. The update is added in place to the layer's output. In backward, the
gradient of the input has one part from the layer and one from the update, and the second is added in place to the
first. Each saves a pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcore.layers.kernels.autograd import apply, runs_plain
from peftcore.layers.kernels.fused_dropout import dropout_mask, masked
from peftcore.utils.autocast import cast_operands

FEW = 64
"""The number of columns up to which a product is computed as its transpose."""


def plain_low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Returns ``weight x + bias + scale B A dropout(x)``."""
    low = F.linear(F.dropout(x, dropout) if dropout else x, A)
    return F.linear(x, weight, bias) + F.linear(low * scale, B)


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Returns the result of `plain_low_rank_linear`, computed by a fused kernel. The weight and the bias must be
    frozen."""
    x, weight, bias, (A, B) = _in_one_dtype(x, weight, bias, A, B)
    if runs_plain(x) or (dropout and dropout == 1):  # a default is a symbol where shapes are, and not to be compared
        return plain_low_rank_linear(x, weight, bias, A, B, scale, dropout)
    if torch.compiler.is_compiling():
        B, scale = B * scale, 1.0  # see `Linear.add`
    A, mask = _dropping(x, A, dropout)
    return apply(_LowRankLinear, x, weight, bias, A, B, scale, mask)[0]


def _in_one_dtype(
    x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """Returns all operands in the dtype in which the layer computes."""
    x, weight, bias = cast_operands(x, weight, bias)
    return x, weight, bias, [each.to(weight.dtype) for each in others]


def _dropping(x: Tensor, A: Tensor, dropout: float) -> tuple[Tensor, Tensor | None]:
    """Returns A multiplied by the scale of dropout, and the dropout mask of the rows of x. Without dropout, returns A
    and None."""
    if not dropout:
        return A, None
    mask, more = dropout_mask(x, dropout)
    return A * more, mask.view(-1, x.shape[-1])


class _LowRankLinear(torch.autograd.Function):
    """Returns the output, and also `low` (the product of A and the input). Therefore backward can be differentiated
    again without saving more tensors. The input is saved only if A trains."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, mask: Any
    ) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        low = F.linear(rows if mask is None else masked(rows, mask), A)
        y = F.linear(x, weight, bias)  # to the bit what the layer returns by itself, whatever the strides of x
        y.view(-1, weight.shape[0]).addmm_(low, B.mT, alpha=scale)
        back, _, _, trains_A, trains_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if trains_A else None, weight, A if back else None, B, low if trains_B else None, mask)
        ctx.scale, ctx.shape = scale, x.shape
        ctx.set_materialize_grads(False)
        return y, low

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, A, B, low, mask = ctx.saved_tensors
        of_y, of_low_too = gradients
        gradient = _rows_of(of_y, ctx.shape, weight)
        of_low = matmul_transposed(gradient, B.mT).mul_(ctx.scale)
        if of_low_too is not None:
            of_low = of_low + of_low_too
        of_x = of_A = of_B = None
        if ctx.needs_input_grad[0]:
            of_x = _through(gradient, weight, of_low, A, mask).view(ctx.shape)
        if x is not None:
            rows = x.reshape(-1, x.shape[-1])
            of_A = of_low.mT @ (rows if mask is None else masked(rows, mask))
        if low is not None:
            of_B = matmul_transposed(gradient.mT, low.mT).mul_(ctx.scale)
        return of_x, None, None, of_A, of_B, None, None


def _rows_of(gradient: Tensor | None, shape: torch.Size, weight: Tensor) -> Tensor:
    """Returns the gradient of the output with its rows in one dimension, ``[rows, out]``; zeros if `gradient` is None.
    `shape` is the shape of the input."""
    if gradient is None:  # backward is being differentiated, and no gradient comes from the output
        gradient = weight.new_zeros(*shape[:-1], weight.shape[0])
    return gradient.reshape(-1, weight.shape[0])


def matmul_transposed(wide: Tensor, few: Tensor) -> Tensor:
    """Returns ``wide few^T``, computed as its transpose if it has few columns: on a CPU a narrow product takes two to
    ten times as long as a flat one.

    Args:
        wide: ``[n, k]``.
        few: ``[columns, k]``, of the same dtype.
    """
    return (few @ wide.mT).mT if few.shape[0] <= FEW else F.linear(wide, few)


def _through(gradient: Tensor, weight: Tensor, of_low: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the gradient of the input rows, through the layer and through the update."""
    of_rows = gradient @ weight
    return of_rows.addmm_(of_low, A) if mask is None else of_rows.addcmul_(of_low @ A, mask.to(of_rows.dtype))
