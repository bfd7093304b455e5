"""RandLoRA: full-rank adaptation by random bases.   Albert et al. 2025, arXiv 2502.00987 (PaulAlbert31/RandLoRA).

Equation:
    W' = W + s sum_j B_j diag(L[:, j]) A diag(G[j]),   j = 1 … n,   n = ceil(min(in, out) / rank),   s = alpha / rank
    A [rank, min(in, out)],   B_j [max(in, out), rank],   L [rank, n],   G [n, min(in, out)]

If out < in, the sum is transposed. A and all B_j are random and frozen. All sites share them, and each uses the
top-left corner of its own size. They are drawn from `projection_seed`, and files contain them only with `store_basis`.
Their entries have variance 1. They are uniform, or, with a sparse `basis`, signs and zeros: one in 3 entries is a sign
with "sparse", and one in sqrt(min) with "very_sparse". All B_j are stored in one tensor [max, n, rank]. If it is
flattened, its columns j, n + j, 2 n + j, … are B_j.

scaling="bases" also divides s by sqrt(n), as in the authors' code. The later code of the authors, in peft, does not.
Kernels of convolutions count as columns (in * kernel), and embeddings count as [dim, num]. Each expert has a separate L
and G.

Parameters: n * (rank + min(in * kernel, out)) a site, times the number of experts: more at a lower rank.

Start: L at zero, G at 1 / max(its shape): the identity.

Differs from the authors' code: The authors and peft flatten the other side of the sum in a different order, which is
irrelevant for random columns. peft draws in half precision.

Use it: `peftcore.apply(model, "randlora")`, where the low rank limits the quality. Each step computes the update as a
full matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
    WeightOperator,
    full_precision,
)
from peftcore_reparameterized._basis import Basis, columns, largest, own_name
from peftcore_reparameterized._kernels import scaled_bases
from peftcore_reparameterized._low_rank import check_in_weight_form, input_dropout


class RandLoRAConfig(MethodConfig):
    """Options of RandLoRA."""

    method: Literal["randlora"] = "randlora"
    rank: PositiveInt = 32
    """Rank of each basis; a lower rank needs more bases, and so more parameters."""
    alpha: PositiveFloat = 640.0
    """Numerator of the scale ``alpha / rank``."""
    scaling: Literal["rank", "bases"] = "rank"
    """Denominator of the scale: the rank, or the rank times the square root of the number of bases."""
    basis: Literal["uniform", "sparse", "very_sparse"] = "uniform"
    """The distribution that the random matrices are drawn from."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    projection_seed: NonNegativeInt = 0
    """Seed of the random matrices."""
    store_basis: bool = False
    """Save the random matrices in files, which grow by their size. Matrices loaded from another library's file are
    always saved."""


def bases(site: Site, rank: int) -> int:
    """Return the number of bases whose sum has full rank."""
    return -(-min(site.out_features, columns(site)) // rank)


def draw(sparsity: float, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Return random values of variance 1: uniform, or, if `sparsity` is not 0, zeros with a sign in about one of
    `sparsity` entries."""
    drawn = torch.empty(*shape).uniform_(-1, 1, generator=generator)
    if sparsity:
        drawn = drawn.sign() * (drawn.abs() > 1 - 1 / sparsity)
    size = drawn.double().square().mean().sqrt()  # precise, so that it is the same on every machine
    return drawn / size.clamp(min=1e-6).float()


class Bases(Basis):
    """The random matrices that all sites share, and the largest shape of a site."""

    def __init__(self, config: RandLoRAConfig, short: int, long: int, span: tuple[int, int]) -> None:
        sparsity = {"uniform": 0.0, "sparse": 3.0, "very_sparse": math.sqrt(short)}[config.basis]
        shapes = (config.rank, short), (long, -(-short // config.rank), config.rank)
        super().__init__(config.projection_seed, partial(draw, sparsity), *shapes, config.store_basis)
        self.config = config
        self.span = span
        """The largest number of outputs and the largest number of inputs of a site."""


class RandLoRAOperator(WeightOperator):
    """The trained scales L and G of one site, and a reference to the shared bases."""

    def __init__(self, site: Site, config: RandLoRAConfig, basis: Shared) -> None:
        super().__init__(site)
        self.basis, self.dropout = basis, input_dropout(site, config.dropout)
        self.inputs = (site.in_features, *site.kernel)
        short, count = min(site.out_features, columns(site)), bases(site, config.rank)
        self.long, self.wide = max(site.out_features, columns(site)), site.out_features < columns(site)
        self.scale = config.alpha / config.rank / (1 if config.scaling == "rank" else math.sqrt(count))
        self.L = nn.Parameter(torch.zeros(*site.batch, config.rank, count))
        self.G = nn.Parameter(torch.full((*site.batch, count, short), 1 / max(count, short)))

    def factors_of(self) -> tuple[Tensor, Tensor]:
        """Return B [long, rank * bases] and the scaled A [*batch, rank * bases, short]. Their product is the update."""
        count, short = self.G.shape[-2:]
        A, B = self.basis.module.A[:, :short].to(self.G), self.basis.module.B[: self.long, :count].to(self.G)
        scaled = scaled_bases(A, self.L, self.G)  # [*batch, rank, bases, short]
        return B.flatten(1), scaled.flatten(-3, -2)

    def prefers_activation_form(self, x: Tensor) -> bool:
        """Whether the update is computed on activations. It is if inputs are dropped, or if products with the inputs
        take fewer operations than computing an update of the weight's size."""
        if self.training and self.dropout:
            return True
        inputs, full = x.numel() // x.shape[-1], self.G.shape[-2] * self.L.shape[-2]
        return self.layer.of_vectors and inputs * (3 * full + self.long) < 3 * full * self.long

    def activation_form(self, call: Callable[..., Tensor], x: Tensor, prepared: None) -> Tensor:
        with full_precision(x):
            first, second = self.factors_of()
        A, B = (first.mT, second.mT) if self.wide else (second, first)
        return self.layer.update(call, x, A.unflatten(-1, self.inputs), B, self.scale, self.training * self.dropout)

    def forward(self, weight: Tensor) -> Tensor:
        check_in_weight_form(self, self.dropout)
        return self.merged(weight)

    def merged(self, weight: Tensor) -> Tensor:
        B, scaled = self.factors_of()
        update = B @ scaled  # [*batch, long, short]
        return weight + self.scale * (update.mT if self.wide else update).reshape(weight.shape)


class RandLoRA(Method):
    """Full-rank adaptation by random bases."""

    name = "randlora"
    Config = RandLoRAConfig
    tags = Tags(category="reparameterized", paper="2502.00987", mergeable=True)
    learning_rate = LearningRate(1e-4, "PaulAlbert31/RandLoRA@4ac565e, GLUE/train_all.sh", on="RoBERTa-base, GLUE")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: RandLoRAConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        pairs = [sorted((site.out_features, columns(site))) for site in sites]
        short, long = largest((a, b) for a, b in pairs)
        span = largest((site.out_features, columns(site)) for site in sites)
        for site in sites:
            own = config.at(site.path)  # a site with other options has bases of its own
            name = own_name(f"{own.basis}_{own.projection_seed}_{own.rank}", own.store_basis)
            basis = surgeon.own(name, partial(Bases, own, short, long, span))
            surgeon.graft(site, RandLoRAOperator, config, basis=basis)

    @staticmethod
    def parameter_count(site: Site, config: RandLoRAConfig) -> int:
        each = config.rank + min(site.out_features, columns(site))
        return math.prod(site.batch) * bases(site, config.rank) * each
