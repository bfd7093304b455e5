"""Rotations of skew-symmetric matrices: the Cayley transform, and its series."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.layers.kernels.autograd import is_plain


def plain_skew(entries: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices ``[*batch, size, size]`` from what stands above the diagonal, row by row."""
    row, column = torch.triu_indices(size, size, 1, device=entries.device)
    matrix = entries.new_zeros(*entries.shape[:-1], size * size)
    matrix = matrix.index_copy(-1, row * size + column, entries).view(*entries.shape[:-1], size, size)
    return matrix - matrix.mT


def _skew(entries: Tensor, size: int) -> Tensor:
    """`plain_skew`, gathered in one pass; where each entry goes is worked out once."""
    source, sign, _ = _kept(_places, size, entries.device)
    return entries.index_select(-1, source).mul_(sign).view(*entries.shape[:-1], size, size)


def _of_entries(of_K: Tensor) -> Tensor:
    """The gradient of the entries, of that of their matrices, which need not be skew-symmetric."""
    _, _, above = _kept(_places, of_K.shape[-1], of_K.device)
    return (of_K - of_K.mT).flatten(-2).index_select(-1, above)


_KEPT: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}


def _kept(make: Callable[..., tuple[Tensor, ...]], *key: Any) -> tuple[Tensor, ...]:
    """What `make` returns for these arguments, made once; not kept is what a mode makes that makes other tensors."""
    known = _KEPT.get((make, *key))
    if known is None:
        known = make(*key)
        if not is_plain() and all(type(each) is Tensor and not each.is_inference() for each in known):
            _KEPT[make, *key] = known
    return known


def _places(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Which entry each value of a skew-symmetric matrix is, with which sign; and where those above the diagonal are."""
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


Kept = tuple[Tensor, ...]
"""What backward reads of what forward made."""


class _Function(NamedTuple):
    """A function of skew-symmetric matrices, and its gradient."""

    make: Callable[..., tuple[Tensor, Kept]]
    """Of entries ``[n, entries]``, size and options: ``[n, size, size]``."""
    gradient: Callable[..., Tensor]
    """The gradient of K, of that of what was made, what is kept and options."""


class _OfEntries(torch.autograd.Function):
    """A function of stacks of entries, each of which gets its own part of what is made of all.

    If they are shared, autograd saves no tensor that was made: so parts, and uses of one part, can be differentiated
    one after the other, as if each had been made alone. What nobody uses a part of has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, function: _Function, size: int, options: tuple[Any, ...], shared: bool, *entries: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        made, kept = function.make(_whole(entries), size, *options)
        ctx.function, ctx.size, ctx.options, ctx.lengths = function, size, options, [len(each) for each in entries]
        ctx.shared = kept if shared else None
        ctx.save_for_backward(*entries, *(() if shared else kept))
        return torch.split(made, ctx.lengths) if shared else (made,)  # nothing that is kept is what is returned

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        used = [number for number, gradient in enumerate(gradients) if gradient is not None]
        if not used:
            return None, None, None, None, *gradients
        if torch.is_grad_enabled():  # backward is differentiated too, and what forward made has no graph
            _, kept = ctx.function.make(_whole([ctx.saved_tensors[each] for each in used]), ctx.size, *ctx.options)
        else:
            kept = ctx.saved_tensors[1:] if ctx.shared is None else _parts(ctx.shared, ctx.lengths, used)
        gradient = ctx.function.gradient(_whole([gradients[each] for each in used]), *kept, *ctx.options)
        found = dict(zip(used, _apart(_of_entries(gradient), [ctx.lengths[each] for each in used]), strict=True))
        return None, None, None, None, *[found.get(number) for number in range(len(gradients))]


def _whole(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _apart(stack: Tensor, lengths: list[int]) -> list[Tensor]:
    """The parts of a stack, each by itself: parameters keep them as their gradients."""
    return [stack] if len(lengths) == 1 else [part.clone() for part in torch.split(stack, lengths)]


def _parts(stacks: Kept, lengths: list[int], used: list[int]) -> Kept:
    """The parts of stacks that are used."""
    if len(used) == len(lengths):
        return stacks
    return tuple(_whole([torch.split(stack, lengths)[each] for each in used]) for stack in stacks)


def _made(function: _Function, entries: Tensor, size: int, *options: Any) -> Tensor:
    """What a function makes of entries in any number of dimensions, whose graph is autograd's to keep."""
    (made,) = _made_of_each(function, [entries], size, *options, shared=False)
    return made


def _made_of_each(
    function: _Function, entries: Sequence[Tensor], size: int, *options: Any, shared: bool = True
) -> list[Tensor]:
    """The same of several, shared by all who use a part of what is made."""
    stacks = [each if each.dim() == 2 else each.reshape(-1, each.shape[-1]) for each in entries]
    parts: Any = _OfEntries.apply(function, size, options, shared, *stacks)  # type: ignore[no-untyped-call]
    return [
        part if each.dim() == 2 else part.view(*each.shape[:-1], size, size)
        for part, each in zip(parts, entries, strict=True)
    ]


def plain_cayley(entries: Tensor, size: int) -> Tensor:
    """``(I - K) (I + K)^-1`` of each skew-symmetric matrix K with these entries (`plain_skew`): every rotation without
    the eigenvalue -1 is one."""
    K = plain_skew(entries, size)
    return _quotient(torch.eye(size, dtype=K.dtype, device=K.device), K)


def _quotient(identity: Tensor, K: Tensor) -> Tensor:
    """The two factors commute. I + K has an inverse for every skew-symmetric K, so nobody waits to hear whether."""
    rotation: Tensor = torch.linalg.solve_ex(identity + K, identity - K)[0]
    return rotation


def cayley(entries: Tensor, size: int) -> Tensor:
    """`plain_cayley`, of which backward keeps the rotation alone and solves nothing."""
    return plain_cayley(entries, size) if is_plain() else _made(_CAYLEY, entries, size)


def cayley_of_each(entries: Sequence[Tensor], size: int) -> list[Tensor]:
    """`cayley` of each of several, at once: for many small ones. Each part, and each use of it, can be differentiated
    after the others, and what is not used has no gradient."""
    return [plain_cayley(each, size) for each in entries] if is_plain() else _made_of_each(_CAYLEY, entries, size)


def _cayley(entries: Tensor, size: int) -> tuple[Tensor, Kept]:
    K = _skew(entries, size)
    R = _product(K) if _is_small(K) else _quotient(_identity_of(K), K)
    return R, (R,)


def _cayley_gradient(gradient: Tensor, R: Tensor) -> Tensor:
    """With (I + K)^-1 = (I + R) / 2, a step dK turns R by -(I + R) dK (I + R) / 2."""
    around = (R + _identity_of(R)).mT
    return torch.bmm(torch.bmm(around, gradient), around * -0.5)


_CAYLEY = _Function(_cayley, _cayley_gradient)
WIDE = 16
"""Matrices of this size and wider take longer to solve than six products of them."""
SMALL = {dtype: math.sqrt(2) * torch.finfo(dtype).eps ** (1 / 16) for dtype in (torch.float32, torch.float64)}
"""The norm of a skew-symmetric matrix below which its 16th power is nothing beside the identity: what it makes of a
vector is longer by no more than the norm over the root of two."""


def _is_small(K: Tensor) -> bool:
    """Whether `_product` is exact to rounding, and worth it; asked on a CPU, where nobody waits for the answer."""
    if not K.shape[0] or K.shape[-1] < WIDE or K.device.type != "cpu" or type(K) is not Tensor or K.dtype not in SMALL:
        return False
    return bool(torch.linalg.vector_norm(K, dim=(-2, -1)).amax() < SMALL[K.dtype])


def _product(K: Tensor) -> Tensor:
    """``(I - K)^2 (I + K^2) (I + K^4) (I + K^8)``: the Cayley transform but for K^16."""
    identity = _identity_of(K)
    first = _first_sum(K)
    square = first - identity
    fourth = torch.bmm(square, square)
    more = torch.baddbmm(first, fourth, first)
    more = torch.baddbmm(more, torch.bmm(fourth, fourth), more)
    return torch.bmm(more, torch.sub(first, K, alpha=2))


def plain_neumann(entries: Tensor, size: int, terms: int) -> Tensor:
    """The Cayley transform of each skew-symmetric matrix K with these entries (`plain_skew`) as a sum of powers of K:
    1, -2, 2, -2, ... of them, and half of that of the last one; four terms or more."""
    K = plain_skew(entries, size)
    identity = torch.eye(size, dtype=K.dtype, device=K.device)
    total = 2 * identity - K
    for _ in range(terms - 3):
        total = 2 * identity - K @ total
    return identity - K @ total


def neumann(entries: Tensor, size: int, terms: int) -> Tensor:
    """`plain_neumann`, of which backward keeps two matrices alone."""
    return _by_product(entries, size, terms) if is_plain() else _made(_NEUMANN, entries, size, terms)


def neumann_of_each(entries: Sequence[Tensor], size: int, terms: int) -> list[Tensor]:
    """`neumann` of each, as `cayley_of_each`."""
    if is_plain():
        return [_by_product(each, size, terms) for each in entries]
    return _made_of_each(_NEUMANN, entries, size, terms)


def _by_product(entries: Tensor, size: int, terms: int) -> Tensor:
    K = plain_skew(entries, size)
    stack = K.reshape(-1, size, size)
    return _series(stack, _first_sum(stack), terms).view(K.shape)


def _neumann(entries: Tensor, size: int, terms: int) -> tuple[Tensor, Kept]:
    K = _skew(entries, size)
    first = _first_sum(K)
    return _series(K, first, terms), (K, first)


def _neumann_gradient(gradient: Tensor, K: Tensor, first: Tensor, terms: int) -> Tensor:
    """Sums of even powers are symmetric, and K^T = -K. The gradient of K^2 by way of K is -(Q K + K Q), Q that of the
    square; along what is skew-symmetric, as every change of K, -(Q + Q^T) K is the same."""
    pair, sums = _factors(K, first, terms)
    even, of_even = terms % 2 == 0, gradient
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
    return of_K


_NEUMANN = _Function(_neumann, _neumann_gradient)


def _first_sum(K: Tensor) -> Tensor:
    """I + K^2."""
    return torch.baddbmm(_identity_of(K), K, K)


def _series(K: Tensor, first: Tensor, terms: int) -> Tensor:
    """`plain_neumann` as a product: for terms 2 m + 1 it is (I - K)^2 (I + K^2 + ... + K^(2 m - 2)); for one term more,
    I - K (I + that of one less)."""
    odd = _odd_series(*_factors(K, first, terms))
    return odd if terms % 2 else torch.baddbmm(_identity_of(K) - K, K, odd, alpha=-1)


def _odd_series(pair: Tensor, sums: list[Tensor]) -> Tensor:
    return torch.bmm(sums[-1], pair) if sums else pair


def _factors(K: Tensor, first: Tensor, terms: int) -> tuple[Tensor, list[Tensor]]:
    """(I - K)^2, and the sums I + K^2, I + K^2 + K^4, ..."""
    sums = [first][: (terms - 3) // 2]
    for _ in range((terms - 5) // 2):
        sums.append(torch.baddbmm(_identity_of(K), first - _identity_of(K), sums[-1]))
    return torch.sub(first, K, alpha=2), sums
