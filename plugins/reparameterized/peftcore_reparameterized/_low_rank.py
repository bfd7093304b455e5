"""Base operator of low-rank methods, and functions for its two factors: their initial values, and their product in the
shape of the weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftcore.author import Operator, Site, low_rank
from peftcore.errors import TrainingError, UnsupportedSite


def low_rank_factors(site: Site, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A [*batch, rank, in, *kernel] and B [*batch, out, rank], of which exactly one is zero.

    A is uniform in +-1/sqrt(in * kernel) and B zero; for embeddings A is zero and B ~ N(0, 1), since an input picks a
    single column of A.
    """
    batch, inputs = site.batch, (site.in_features, *site.kernel)
    of_A, of_B = (*batch, rank, *inputs), (*batch, site.out_features, rank)
    if site.layer.one_hot:
        return nn.Parameter(torch.zeros(of_A)), nn.Parameter(torch.randn(of_B))
    bound = 1 / math.sqrt(math.prod(inputs))
    return nn.Parameter(torch.empty(of_A).uniform_(-bound, bound)), nn.Parameter(torch.zeros(of_B))


def orthogonal_factors(site: Site, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A [*batch, rank, in, *kernel] and B [*batch, out, rank], which are not zero, but whose product B A is zero
    up to rounding.

    Each factor is a random mixture of the rows of one half of an orthogonal matrix.
    """
    inputs = (site.in_features, *site.kernel)
    Q = torch.linalg.qr(torch.randn(*site.batch, rank, rank)).Q
    A = torch.randn(*site.batch, math.prod(inputs), rank // 2) @ Q[..., 0::2, :] / 10
    B = torch.randn(*site.batch, site.out_features, rank // 2) @ Q[..., 1::2, :] / 10
    return nn.Parameter(A.mT.unflatten(-1, inputs).contiguous()), nn.Parameter(B)


def low_rank_update(A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """Return the product B A in the shape of `weight` [*batch, out, in, *kernel]."""
    return (B @ A.flatten(B.dim() - 1)).view(weight.shape)


def add_low_rank(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return ``weight + B A`` for a weight [*batch, out, in, *kernel], where possible without the product in memory.

    B includes the scale already, because inductor loses the `alpha` of `addmm` and `baddbmm`.
    """
    if weight.dim() == A.dim() == B.dim() and weight.dtype == A.dtype == B.dtype:
        return (torch.addmm if weight.dim() == 2 else torch.baddbmm)(weight, B, A)
    return weight + low_rank_update(A, B, weight)


def low_rank_count(site: Site, rank: int) -> int:
    """Return the number of values in both factors."""
    return math.prod(site.batch) * rank * (site.in_features * math.prod(site.kernel) + site.out_features)


def input_dropout(site: Site, probability: float) -> float:
    """Return `probability`, after a check that inputs of the site can be dropped.

    Raises:
        UnsupportedSite: `probability` is not 0, and the site is an embedding, whose inputs are token ids, or a tensor
            that another module reads, so that the update has no input.
    """
    if probability and site.layer.one_hot:
        raise UnsupportedSite(f"{site.path} reads token ids, which dropout cannot act on; use dropout=0 for it")
    if probability and site.form == "weight":
        raise UnsupportedSite(
            f"{site.path} is read, not called, so dropout cannot reach its input; use dropout=0 or exclude it"
        )
    return probability


def check_in_weight_form(operator: nn.Module, probability: float) -> None:
    """Check that an operator with dropout acts on inputs.

    Raises:
        TrainingError: the operator acts on the weight in training, which has no inputs to drop.
    """
    if probability and operator.training:
        raise TrainingError(
            "dropout acts on inputs of a module, but here only the effective weight is computed, because of "
            "low_memory or because several adapters change one weight. Train them one after the other, without "
            "low_memory, or with dropout=0"
        )


class LowRankOperator(Operator):
    """Adds the product of two factors: ``y = W x + b + s B A dropout(x)``. `factors` returns A, B and s."""

    stackable = True

    def __init__(self, site: Site, dropout: float = 0.0) -> None:
        super().__init__(site)
        self.input_dropout = input_dropout(site, dropout)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return A ``[*batch, rank, in, *kernel]``, B ``[*batch, out, rank]`` and the scale s."""
        raise NotImplementedError

    @low_rank
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        *factors, scale = self.factors()
        A, B = self.cast(y, *factors)
        low = self.layer.apply_dropped(x, A, self.input_dropout if self.training else 0.0)
        return y + self.layer.mix(scale * low, B)

    def merged(self, weight: Tensor) -> Tensor:
        A, B, scale = self.factors()
        return add_low_rank(weight, A, scale * B)
