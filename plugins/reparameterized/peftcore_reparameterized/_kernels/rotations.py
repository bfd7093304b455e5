"""Rotations in blocks, of rows and of the inputs of a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcore.author import Layer, cast_operands, runs_plain


def plain_rotate(x: Tensor, R: Tensor) -> Tensor:
    """Multiply rows ``[..., blocks * size]`` by a block-diagonal matrix of blocks ``[blocks, size, size]``; a single
    block is used for all."""
    parts = x.reshape(-1, x.shape[-1] // R.shape[-1], R.shape[-1])  # [n, blocks, size]
    return (parts.transpose(0, 1) @ R).transpose(0, 1).reshape(x.shape)


def rotate(x: Tensor, R: Tensor) -> Tensor:
    """Compute `plain_rotate` by the implementation with the fewest passes over memory on the device."""
    if runs_plain() or R.shape[0] == 1:
        return plain_rotate(x, R)
    return _Rotate.apply(x, R)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor) -> Tensor:
        ctx.save_for_backward(x, R)
        return _turned_rows(x, R)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, R = ctx.saved_tensors
        (gradient,) = gradients
        return _back(x, R, gradient, *ctx.needs_input_grad)


def _back(
    x: Tensor, R: Tensor, gradient: Tensor, wants_x: bool, wants_R: bool, own: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradient of the rows, in the shape of `x`, and the gradient of the rotation.

    Args:
        own: whether no other code uses `gradient`, so that its memory may be overwritten.
    """
    blocks = _laid(gradient, R)
    of_R = torch.bmm(blocks.mT, _blocks(x, R)).mT if wants_R else None  # what is transposed lies together
    if not wants_x:
        return None, of_R
    if torch.is_grad_enabled() or gradient.device.type != "cpu":
        return rotate(gradient, R.mT).view(x.shape), of_R
    return _turned_blocks(blocks, R.mT, gradient.view(blocks.shape) if own else None).view(x.shape), of_R


def _blocks(x: Tensor, R: Tensor) -> Tensor:
    """Return the rows of x by blocks, ``[blocks, n, size]``."""
    return x.reshape(-1, *R.shape[:2]).transpose(0, 1)


def _laid(x: Tensor, R: Tensor) -> Tensor:
    """Return `_blocks`, on a CPU as a contiguous copy. There, copying takes less time than a product that reads or
    writes only a few columns of each row."""
    blocks = _blocks(x, R)
    return blocks.clone(memory_format=torch.contiguous_format) if x.device.type == "cpu" else blocks


def _turned_blocks(blocks: Tensor, R: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Rotate blocks ``[blocks, n, size]`` in place, and return them as rows ``[n, blocks, size]``."""
    turned = torch.bmm(blocks, R, out=scratch)
    return blocks.view(-1, *R.shape[:2]).copy_(turned.transpose(0, 1))


def _turned_rows(x: Tensor, R: Tensor) -> Tensor:
    turned = _turned_blocks(_laid(x, R), R) if x.device.type == "cpu" else _where_they_lie(x, R)
    return turned.view(x.shape)


def _where_they_lie(x: Tensor, R: Tensor) -> Tensor:
    """Return rotated rows ``[n, blocks, size]``. The product is written directly into them."""
    turned = x.new_empty(x.numel() // x.shape[-1], *R.shape[:2])
    torch.bmm(_blocks(x, R), R, out=turned.transpose(0, 1))
    return turned


# A linear layer of turned inputs


def rotated(layer: Layer, call: Callable[..., Tensor], x: Tensor, R: Tensor, exact: bool = True) -> Tensor:
    """Return ``call`` on rotated inputs, where `call` is the inner layer of an operator.

    Args:
        layer: the layer of the site, which maps each vector of x separately (`Layer.of_vectors`).
        x: the input of the layer, ``[..., in]``.
        R: blocks ``[blocks, size, size]`` of any dtype; a single block is used for all.
        exact: whether R are exact rotations, so that their transposes are their inverses.
    """
    own = layer.frozen_linear(call, x, x.shape[-1])
    return call(rotate(x, R.to(x.dtype))) if own is None else rotated_linear(x, *own, R, exact)


def plain_rotated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, R: Tensor) -> Tensor:
    """Compute ``weight R^T x + bias``: a linear layer of rows that `plain_rotate` rotates."""
    return F.linear(plain_rotate(x, R), weight, bias)


def rotated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, R: Tensor, exact: bool = True) -> Tensor:
    """Compute `plain_rotated_linear` of a frozen weight as one autograd function. It rotates either the rows or the
    weight, whichever takes less work.

    Args:
        exact: whether R are exact rotations, so that their transposes are their inverses.
    """
    x, weight, bias = cast_operands(x, weight, bias)
    R = R.to(weight.dtype)
    if runs_plain():
        return plain_rotated_linear(x, weight, bias, R)
    if R.shape[0] == 1:
        R = R.expand(x.shape[-1] // R.shape[-1], -1, -1)
    many = x.numel() // x.shape[-1] >= 2 * weight.shape[0]
    function = _TurnedWeight if exact and many else _TurnedRows
    return function.apply(x, weight, bias, R)


class _TurnedRows(torch.autograd.Function):
    """A linear layer of rotated rows, for any R."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, R: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, R)
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] >= weight.shape[0]:
            y = F.linear(rows, _turned(weight, R), bias)
        else:
            y = F.linear(_turned_rows(rows, R), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, R = ctx.saved_tensors
        (gradient,) = gradients
        of_turned = gradient.reshape(-1, weight.shape[0]) @ weight
        of_x, of_R = _back(x, R, of_turned, ctx.needs_input_grad[0], ctx.needs_input_grad[3], own=True)
        return of_x, None, None, of_R


class _TurnedWeight(torch.autograd.Function):
    """A linear layer with a rotated weight. Let u be the gradient of the rotated rows. The rotated weight gives ``of_x
    = u R^T`` directly, and ``of_R = x^T u`` equals ``x^T of_x R`` in each block. So only the weight is rotated.
    Backward rotates it again, so the rotated weight is not stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, R: Tensor) -> Tensor:
        return _TurnedRows.forward(ctx, x, weight, bias, R)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():  # backward is differentiated too, and what it says of R must hold beside rotations
            return _TurnedRows.backward(ctx, *gradients)
        x, weight, R = ctx.saved_tensors
        (gradient,) = gradients
        of_x = gradient.reshape(-1, weight.shape[0]) @ _turned(weight, R)
        of_R = torch.bmm(torch.bmm(_laid(of_x, R).mT, _blocks(x, R)).mT, R) if ctx.needs_input_grad[3] else None
        return of_x.view(x.shape), None, None, of_R


def _turned(weight: Tensor, R: Tensor) -> Tensor:
    """Return the rotated weight ``[out, in]``, which has the effect of rotated inputs. Its memory is that of its
    contiguous transpose, so the product writes whole blocks."""
    return torch.bmm(R, _blocks(weight, R).mT).view(weight.shape[::-1]).mT
