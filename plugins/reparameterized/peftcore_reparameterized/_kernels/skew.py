"""Rotations from skew-symmetric matrices: the Cayley transform, and its approximation by a series."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftcore.author import runs_plain


def plain_skew(entries: Tensor, size: int) -> Tensor:
    """Make skew-symmetric matrices ``[*batch, size, size]`` from the entries above the diagonal, row by row."""
    row, column = torch.triu_indices(size, size, 1, device=entries.device)
    matrix = entries.new_zeros(*entries.shape[:-1], size * size)
    matrix = matrix.index_copy(-1, row * size + column, entries).view(*entries.shape[:-1], size, size)
    return matrix - matrix.mT


def _skew(entries: Tensor, size: int) -> Tensor:
    """Compute `plain_skew` by a gather of the entries, whose indices are cached."""
    source, sign, _ = _kept(_places, size, entries.device)
    return entries.index_select(-1, source).mul_(sign).view(*entries.shape[:-1], size, size)


def _of_entries(of_K: Tensor) -> Tensor:
    """Return the gradient of the entries from the gradient of the matrices, which need not be skew-symmetric."""
    _, _, above = _kept(_places, of_K.shape[-1], of_K.device)
    return (of_K - of_K.mT).flatten(-2).index_select(-1, above)


_KEPT: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}


def _kept(make: Callable[..., tuple[Tensor, ...]], *key: Any) -> tuple[Tensor, ...]:
    """Return ``make(*key)``, which is cached. Results of special kinds, such as inference tensors, are not cached."""
    known = _KEPT.get((make, *key))
    if known is None:
        known = make(*key)
        if not runs_plain() and all(type(each) is Tensor and not each.is_inference() for each in known):
            _KEPT[make, *key] = known
    return known


def _places(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors that describe a flattened skew-symmetric matrix: the index of the entry at each position,
    the sign of the entry there, and the positions above the diagonal."""
    row, column = torch.triu_indices(size, size, 1, device=device)
    above, below = row * size + column, column * size + row
    numbers = torch.arange(len(above), device=device)
    source = above.new_zeros(size * size).index_copy_(0, above, numbers).index_copy_(0, below, numbers)
    sign = torch.zeros(size * size, device=device).index_fill_(0, above, 1.0).index_fill_(0, below, -1.0)
    return source, sign, above


def _identity(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    return (torch.eye(size, dtype=dtype, device=device),)


def _identity_of(K: Tensor) -> Tensor:
    return _kept(_identity, K.shape[-1], K.dtype, K.device)[0]


def _of_stack(function: type[torch.autograd.Function], entries: Tensor, size: int, *options: Any) -> Tensor:
    """Apply a function of a stack of entries ``[n, entries]`` to entries of any number of dimensions."""
    if entries.dim() == 2:
        return function.apply(entries, size, *options)
    batch = entries.shape[:-1]
    return function.apply(entries.reshape(-1, entries.shape[-1]), size, *options).view(*batch, size, size)


def plain_cayley(entries: Tensor, size: int) -> Tensor:
    """Compute ``(I - K) (I + K)^-1`` of each skew-symmetric matrix K with these entries (`plain_skew`). Every rotation
    without the eigenvalue -1 has this form."""
    K = plain_skew(entries, size)
    return _quotient(torch.eye(size, dtype=K.dtype, device=K.device), K)


def _quotient(identity: Tensor, K: Tensor) -> Tensor:
    """Return ``(I + K)^-1 (I - K)``; the two factors commute. I + K has an inverse for every skew-symmetric K, so the
    check for errors, which waits for the device, is skipped."""
    rotation: Tensor = torch.linalg.solve_ex(identity + K, identity - K)[0]
    return rotation


def cayley(entries: Tensor, size: int) -> Tensor:
    """Compute `plain_cayley`; backward keeps only the rotation and solves no linear system."""
    return plain_cayley(entries, size) if runs_plain() else _of_stack(_Cayley, entries, size)


class _Cayley(torch.autograd.Function):
    """The Cayley transform as an autograd function. With (I + K)^-1 = (I + R) / 2, a step dK changes R by -(I + R) dK
    (I + R) / 2."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, size: int) -> Tensor:
        K = _skew(entries, size)
        R = _product(K) if _is_small(K) else _quotient(_identity_of(K), K)
        ctx.save_for_backward(R)
        return R

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (R,), (gradient,) = ctx.saved_tensors, gradients
        around = (R + _identity_of(R)).mT
        return _of_entries(torch.bmm(torch.bmm(around, gradient), around * -0.5)), None


WIDE = 16
"""From this matrix size on, a solve takes longer than six matrix products."""
SMALL = {dtype: math.sqrt(2) * torch.finfo(dtype).eps ** (1 / 16) for dtype in (torch.float32, torch.float64)}
"""The norm of a skew-symmetric matrix below which its 16th power is negligible next to the identity: the matrix scales
the length of a vector by at most its norm divided by the root of two."""


def _is_small(K: Tensor) -> bool:
    """Whether `_product` is exact up to rounding, and faster than a solve. It is False on devices other than a CPU,
    where reading the norm would wait for the device."""
    if not K.shape[0] or K.shape[-1] < WIDE or K.device.type != "cpu" or type(K) is not Tensor or K.dtype not in SMALL:
        return False
    return bool(torch.linalg.vector_norm(K, dim=(-2, -1)).amax() < SMALL[K.dtype])


def _product(K: Tensor) -> Tensor:
    """Compute ``(I - K)^2 (I + K^2) (I + K^4) (I + K^8)``: the Cayley transform up to a factor I - K^16."""
    identity = _identity_of(K)
    first = _first_sum(K)
    square = first - identity
    fourth = torch.bmm(square, square)
    more = torch.baddbmm(first, fourth, first)
    more = torch.baddbmm(more, torch.bmm(fourth, fourth), more)
    return torch.bmm(more, torch.sub(first, K, alpha=2))


def plain_neumann(entries: Tensor, size: int, terms: int) -> Tensor:
    """Compute the Cayley transform of each skew-symmetric matrix K with these entries (`plain_skew`) as a series of
    powers of K. Its coefficients are 1, -2, 2, -2, ..., and the last one is halved. There are four terms or more."""
    K = plain_skew(entries, size)
    identity = torch.eye(size, dtype=K.dtype, device=K.device)
    total = 2 * identity - K
    for _ in range(terms - 3):
        total = 2 * identity - K @ total
    return identity - K @ total


def neumann(entries: Tensor, size: int, terms: int) -> Tensor:
    """Compute `plain_neumann`; backward keeps only two matrices."""
    if runs_plain():
        K = plain_skew(entries, size)
        stack = K.reshape(-1, size, size)
        return _series(stack, _first_sum(stack), terms).view(K.shape)
    return _of_stack(_Neumann, entries, size, terms)


class _Neumann(torch.autograd.Function):
    """The series as an autograd function. Sums of even powers are symmetric, and K^T = -K. Let Q be the gradient of
    K^2. Its contribution to the gradient of K is -(Q K + K Q). Changes of K are skew-symmetric, and for these -(Q +
    Q^T) K is equivalent."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, size: int, terms: int) -> Tensor:
        K = _skew(entries, size)
        first = _first_sum(K)
        ctx.size, ctx.terms = size, terms
        ctx.save_for_backward(entries, K, first)
        return _series(K, first, terms)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (entries, K, first), (gradient,) = ctx.saved_tensors, gradients
        if torch.is_grad_enabled():  # backward is differentiated too, and what forward made has no graph
            K = plain_skew(entries, ctx.size)
            first = _first_sum(K)
        pair, sums = _factors(K, first, ctx.terms)
        even, of_even = ctx.terms % 2 == 0, gradient
        if even:
            gradient = torch.bmm(K, gradient)
        of_pair = of_square = gradient
        if sums:
            of_pair = of_square = torch.bmm(sums[-1], gradient)
            left, right = gradient, pair.mT  # whose product is the gradient of the last sum
            for below in reversed(sums[:-1]):
                of_sum = torch.bmm(left, right)
                of_square = torch.baddbmm(of_square, of_sum, below)
                left, right = first - _identity_of(K), of_sum
            of_square = torch.baddbmm(of_square, left, right)
        of_K = torch.baddbmm(of_pair, of_square + of_square.mT, K, beta=-2, alpha=-1)
        if even:
            of_K = torch.baddbmm(of_K - of_even, of_even, _odd_series(pair, sums).mT, alpha=-1)
        return _of_entries(of_K), None, None


def _first_sum(K: Tensor) -> Tensor:
    """Compute I + K^2."""
    return torch.baddbmm(_identity_of(K), K, K)


def _series(K: Tensor, first: Tensor, terms: int) -> Tensor:
    """Compute `plain_neumann` as a product. With 2 m + 1 terms it is (I - K)^2 (I + K^2 + ... + K^(2 m - 2)). With one
    term more it is I - K (I + S), where S is the series with 2 m + 1 terms."""
    odd = _odd_series(*_factors(K, first, terms))
    return odd if terms % 2 else torch.baddbmm(_identity_of(K) - K, K, odd, alpha=-1)


def _odd_series(pair: Tensor, sums: list[Tensor]) -> Tensor:
    return torch.bmm(sums[-1], pair) if sums else pair


def _factors(K: Tensor, first: Tensor, terms: int) -> tuple[Tensor, list[Tensor]]:
    """Return (I - K)^2, and the sums I + K^2, I + K^2 + K^4, ..."""
    sums = [first][: (terms - 3) // 2]
    for _ in range((terms - 5) // 2):
        sums.append(torch.baddbmm(_identity_of(K), first - _identity_of(K), sums[-1]))
    return torch.sub(first, K, alpha=2), sums
