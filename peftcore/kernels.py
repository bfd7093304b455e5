"""What several methods compute at every step, arranged for speed. Each stands for plain mathematics (`plain_*`), which
the tests hold it against, and which runs under torch.compile, torch.func and wherever autograd is not plain."""

from __future__ import annotations

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
    return torch.compiler.is_compiling() or transformed() or torch._C._get_tracing_state() is not None


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    output: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return output


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
    return _apply(_Rotate, x, R)


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


# Skew-symmetric matrices, and their rotations


def plain_skew(entries: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices ``[*batch, size, size]`` from what stands above the diagonal, row by row."""
    row, column = torch.triu_indices(size, size, 1, device=entries.device)
    matrix = entries.new_zeros(*entries.shape[:-1], size * size)
    matrix = matrix.index_copy(-1, row * size + column, entries).view(*entries.shape[:-1], size, size)
    return matrix - matrix.mT


def skew(entries: Tensor, size: int) -> Tensor:
    """`plain_skew`, gathered in one pass there and one back; where each entry goes is worked out once."""
    return plain_skew(entries, size) if _plain() else _apply(_Skew, entries, size)


class _Skew(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entries: Tensor, size: int) -> Tensor:
        source, sign, ctx.above = _places(size, entries.device)
        return entries.index_select(-1, source).mul_(sign).view(*entries.shape[:-1], size, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return (gradient - gradient.mT).flatten(-2).index_select(-1, ctx.above), None


_PLACES: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}


def _places(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Which entry each value of a skew-symmetric matrix is, with which sign; and where those above the diagonal are."""
    known = _PLACES.get((size, device))
    if known is None:
        row, column = torch.triu_indices(size, size, 1, device=device)
        above, below = row * size + column, column * size + row
        numbers = torch.arange(len(above), device=device)
        source = above.new_zeros(size * size).index_copy_(0, above, numbers).index_copy_(0, below, numbers)
        sign = torch.zeros(size * size, device=device).index_fill_(0, above, 1.0).index_fill_(0, below, -1.0)
        known = source, sign, above
        if type(source) is Tensor and not source.is_inference():  # of a mode that makes others, none is kept
            _PLACES[size, device] = known
    return known


def plain_cayley(K: Tensor) -> Tensor:
    """``(I - K) (I + K)^-1`` of each skew-symmetric matrix ``[*batch, size, size]``: every rotation without the
    eigenvalue -1 is one."""
    identity = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    rotation: Tensor = torch.linalg.solve(identity + K, identity - K)  # the two factors commute
    return rotation


def cayley(K: Tensor) -> Tensor:
    """`plain_cayley`, of which backward keeps the rotation alone and solves nothing."""
    return plain_cayley(K) if _plain() else _apply(_Cayley, K)


class _Cayley(torch.autograd.Function):
    """With (I + K)^-1 = (I + R) / 2, a step dK turns R by -(I + R) dK (I + R) / 2."""

    @staticmethod
    def forward(ctx: Any, K: Tensor) -> Tensor:
        R = plain_cayley(K)
        ctx.save_for_backward(R)
        return R

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (R,), (gradient,) = ctx.saved_tensors, gradients
        around = (R + torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)).mT
        return around @ gradient @ around * -0.5


def plain_neumann(K: Tensor, terms: int) -> Tensor:
    """The Cayley transform as a sum of powers of K ``[*batch, size, size]``: 1, -2, 2, -2, ... of them, and half of
    that of the last one; four terms or more."""
    identity = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    total = 2 * identity - K
    for _ in range(terms - 3):
        total = 2 * identity - K @ total
    return identity - K @ total


def neumann(K: Tensor, terms: int) -> Tensor:
    """`plain_neumann`, of which backward keeps K alone."""
    stack = K if K.dim() == 3 else K.reshape(-1, *K.shape[-2:])
    if _plain():
        return _series(stack, terms).view(K.shape)
    rotation = _apply(_Neumann, stack, terms)
    return rotation if K.dim() == 3 else rotation.view(K.shape)


class _Neumann(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, K: Tensor, terms: int) -> Tensor:
        ctx.terms = terms
        ctx.save_for_backward(K)
        return _series(K, terms)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (K,), (gradient,) = ctx.saved_tensors, gradients
        square, _, inner = _pairs(K, ctx.terms)
        of_K, of_square = -2 * gradient, torch.zeros_like(K)
        for bracket in reversed(inner):
            of_square = torch.baddbmm(of_square, gradient, bracket.mT)
            gradient = square.mT @ gradient
            of_K = torch.sub(of_K, gradient, alpha=2)
        if ctx.terms % 2:  # the innermost ends in K^2 itself
            of_square = of_square + gradient
        else:  # in -K, not in -2 K
            of_K = of_K + gradient
        return torch.baddbmm(torch.baddbmm(of_K, of_square, K.mT), K.mT, of_square), None


def _series(K: Tensor, terms: int) -> Tensor:
    """`plain_neumann` in powers of K^2, with half as many products: [I - 2 K] + K^2 ([2 I - 2 K] + K^2 (...))."""
    square, pair, inner = _pairs(K, terms)
    return torch.baddbmm(pair - torch.eye(K.shape[-1], dtype=K.dtype, device=K.device), square, inner[-1])


def _pairs(K: Tensor, terms: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """K^2, 2 I - 2 K, and what is multiplied with K^2 on the way, the innermost first."""
    twice = 2 * torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    square, pair = K @ K, torch.sub(twice, K, alpha=2)
    found = [pair + square if terms % 2 else twice - K]
    for _ in range(terms // 2 - 2):
        found.append(torch.baddbmm(pair, square, found[-1]))
    return square, pair, found


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
    return _apply(_MaskedLinear, x, weight * scale, kept)


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


# A linear layer and a low-rank update of it


def plain_low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """``weight x + bias + scale B A dropout(x)``."""
    low = F.linear(F.dropout(x, dropout) if dropout else x, A)
    return torch.add(F.linear(x, weight, bias), F.linear(low, B), alpha=scale)


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """`plain_low_rank_linear` of a frozen weight: the update is added where the output stands, and in backward its part
    of the input's gradient where that of the layer stands, instead of going through memory once more each time."""
    dtype = weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    A, B = A.to(dtype), B.to(dtype)
    if _plain() or dropout == 1:
        return plain_low_rank_linear(x, weight, bias, A, B, scale, dropout)
    if not x.requires_grad:  # nothing goes back through the layer: torch adds in place, and need not keep A
        rows = x.reshape(-1, x.shape[-1])
        low = dropped_linear(rows, A, dropout) if dropout else F.linear(rows, A)
        return F.linear(rows, weight, bias).addmm_(low, B.mT, alpha=scale).view(*x.shape[:-1], len(weight))
    kept = None
    if dropout:
        kept, more = keep(x, dropout)
        kept, A = kept.view(-1, x.shape[-1]), A * more
    return _apply(_LowRankLinear, x, weight, bias, A, B, scale, kept)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, kept: Any
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = F.linear(rows if kept is None else _masked(rows, kept), A)
        y = F.linear(rows, weight, bias).addmm_(low, B.mT, alpha=scale)
        ctx.save_for_backward(x, weight, A, B, low, kept)
        ctx.scale = scale
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, A, B, low, kept = ctx.saved_tensors
        rows, gradient = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, len(weight))
        if torch.is_grad_enabled():  # to be differentiated once more
            low = F.linear(rows if kept is None else _masked(rows, kept), A)
        of_low = (gradient @ B).mul_(ctx.scale)
        of_x = of_A = of_B = None
        if ctx.needs_input_grad[0]:
            of_rows = gradient @ weight
            of_rows = of_rows.addmm_(of_low, A) if kept is None else of_rows.add_(_masked(of_low @ A, kept))
            of_x = of_rows.view(x.shape)
        if ctx.needs_input_grad[3]:
            of_A = of_low.mT @ (rows if kept is None else _masked(rows, kept))
        if ctx.needs_input_grad[4]:
            of_B = (gradient.mT @ low).mul_(ctx.scale)
        return of_x, None, None, of_A, of_B, None, None


# A sum with something scaled


def plain_add_scaled(y: Tensor, gain: Tensor, z: Tensor) -> Tensor:
    """``y + gain z``, the gain of fewer entries than z."""
    return y + gain * z


def add_scaled(y: Tensor, gain: Tensor, z: Tensor) -> Tensor:
    """`plain_add_scaled` in one pass, and one pass less in backward than `torch.addcmul` takes."""
    return plain_add_scaled(y, gain, z) if _plain() else _apply(_AddScaled, y, gain, z)


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
    """``L[..., r, b] A[r, i] G[..., b, i]``: a matrix ``[rank, in]`` in as many scaled copies as there are bases."""
    return L.unsqueeze(-1) * A.unsqueeze(-2) * G.unsqueeze(-3)


def scaled_bases(A: Tensor, L: Tensor, G: Tensor) -> Tensor:
    """`plain_scaled_bases` of a fixed A, of which backward keeps the scales alone and makes one tensor of that size."""
    if _plain() or A.requires_grad:
        return plain_scaled_bases(A, L, G)
    return _apply(_ScaledBases, A, L, G)


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
