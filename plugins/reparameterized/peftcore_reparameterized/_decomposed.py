"""Decompositions of weights: the weight as a matrix, its principal part, and an update that is the difference between a
trained pair of factors and a frozen copy of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftcore.author import Site
from peftcore_reparameterized._low_rank import LowRankOperator, input_dropout


def rank_within(site: Site, rank: int) -> int:
    """Return `rank`, but at most the smaller side of the weight ``[out, in * kernel]``. A decomposition has no more
    directions than that."""
    return min(rank, site.out_features, site.in_features * math.prod(site.kernel))


def as_matrix(site: Site) -> Tensor:
    """Return the weight as ``[*batch, out, in * kernel]``, in float32 at least, since torch decomposes no
    matrices in half precision."""
    columns = site.in_features * math.prod(site.kernel)
    weight = site.weight().detach().reshape(*site.batch, site.out_features, columns)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def as_rows(site: Site, rows: Tensor) -> Tensor:
    """Return rows ``[*batch, rank, in * kernel]`` in the layout of a first factor, ``[*batch, rank, in, *kernel]``."""
    return rows.unflatten(-1, (site.in_features, *site.kernel))


def principal(matrix: Tensor, rank: int, iterations: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U ``[*batch, out, rank]``, S ``[*batch, rank]`` and V' ``[*batch, rank, in]`` of the largest singular
    values.

    With `iterations` the result is an approximation by that many steps of subspace iteration from random directions.
    These are drawn on the CPU, so that they depend only on the seed. The sign of a pair of singular vectors is
    arbitrary and depends on the machine; here the largest entry of each column of U is made positive.
    """
    if iterations is None:
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        U, S, V = U[..., :rank], S[..., :rank], V[..., :rank, :]
    else:
        basis = _orthonormal(matrix @ torch.randn(matrix.shape[-1], rank, dtype=matrix.dtype).to(matrix.device))
        for _ in range(0 if matrix.is_meta else iterations):
            basis = _orthonormal(matrix @ _orthonormal(matrix.mT @ basis))
        U, S, V = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
        U = basis @ U
    sign = positive(U.gather(-2, U.abs().argmax(-2, keepdim=True)))  # [*batch, 1, rank]
    return U * sign, S, V * sign.mT


def nearly_principal(matrix: Tensor, rank: int, width: int, iterations: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V' of the `rank` largest singular values, like `principal`, but for a matrix computed from data.
    An approximation starts from `width` random directions of a fixed seed. The largest entry of each row of V' is
    positive."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        U, S, V = principal(matrix, min(width, *matrix.shape[-2:]), iterations)
    U, S, V = U[..., :rank], S[..., :rank], V[..., :rank, :]
    sign = positive(V.gather(-1, V.abs().argmax(-1, keepdim=True)))  # [*batch, rank, 1]
    return U * sign.mT, S, V * sign


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def positive(values: Tensor) -> Tensor:
    """Return the sign that makes each value positive: 1 or -1, and 1 for zero."""
    return 1 - 2 * (values < 0).to(values.dtype)


class PairOperator(LowRankOperator):
    """An update ``s (B A - B0 A0)``: A and B train, and A0 and B0 are their frozen initial values.

    Methods that subtract B0 A0 from the base weight and train B A compute the same outputs. Here the base is unchanged,
    so the adapter can be removed, routed, stacked, and loaded into the original base. A0 and B0 are saved in the
    adapter's file, because a decomposition on another machine would differ by rounding.
    """

    padded, scaled = frozenset({"A", "B", "A0", "B0"}), frozenset({"B", "B0"})
    A0: Tensor
    B0: Tensor

    def __init__(self, site: Site, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(site)
        self.scale = scale
        self.dropout = input_dropout(site, dropout)
        A, B = A.contiguous(), B.contiguous()
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.register_buffer("A0", A)
        self.register_buffer("B0", B)

    def start(self, A: Tensor, B: Tensor) -> None:
        """Set A, B, A0 and B0, for methods that compute them from data."""
        for own, new in ((self.A, A), (self.B, B), (self.A0, A), (self.B0, B)):
            own.data.copy_(new)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Run the layer. In training, dropout acts on the inputs of B A only, since B0 A0 belongs to the base."""
        if not (self.training and self.dropout):
            return super().forward(call, x)
        y = call(x)
        A, B, A0, B0 = self.cast(y, self.A, self.B, self.A0, self.B0)
        y = y + self.layer.mix(self.scale * self.layer.apply_dropped(x, A, self.dropout), B)
        return y - self.layer.mix(self.scale * self.layer.apply(x, A0), B0)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return the factors of the update, in the form ``B (A - A0) + (B - B0) A0``. It is exactly zero at first, and
        small trained changes are not lost in the rounding of two large products."""
        A = torch.cat([self.A - self.A0, self.A0], self.layer.batch_dims)  # [*batch, 2 rank, in, *kernel]
        return A, torch.cat([self.B, self.B - self.B0], -1), self.scale  # B: [*batch, out, 2 rank]
