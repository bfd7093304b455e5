"""VeRA: vector-based random matrix adaptation.   Kopiczko et al. 2023, arXiv 2310.11454 (in peft by its authors).

Equation:
    y = W x + b + diag(b) B diag(d) A dropout(x),   d [rank],   b [out]

A [rank, in] and B [out, rank] are random and frozen. All sites share one pair, which is large enough for the largest
site, and each site uses the top-left corner of its own size. Entries are uniform in +-sqrt(6 / columns), and depend
only on `projection_seed`. They are the same as in peft, for the same seed and sites. Files contain A and B only with
`store_basis`, because loading an adapter draws them again. The update is not scaled.

Kernels of convolutions count as columns, [rank, in * kernel], and embeddings as [dim, num], so an embedding with many
tokens makes A large. Each expert has separate vectors.

Parameters: rank + out a site, times the number of experts.

Start: d at `d_initial`, b at zero: the identity.

Differs from the authors' code: The code in peft, which is by the authors, supports linear layers only.

Use it: `peftcore.apply(model, "vera")`, where an adapter must be tiny, such as one for each of many users. It needs a
large rank and a large learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Share, Shared, Site, Surgeon, Tags
from peftcore_reparameterized._basis import columns, graft_between
from peftcore_reparameterized._kernels import ScaledFactors, scaled_update
from peftcore_reparameterized._low_rank import LowRankOperator


class VeRAConfig(MethodConfig):
    """Options of VeRA."""

    method: Literal["vera"] = "vera"
    rank: PositiveInt = 256
    """Number of rows of A and of columns of B. Each further row adds one trained value per site."""
    d_initial: PositiveFloat = 0.1
    """Initial value of all entries of d."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    projection_seed: NonNegativeInt = 0
    """Seed of A and B."""
    store_basis: bool = False
    """Save the random matrices in files, which grow by their size. Matrices loaded from another library's file are
    always saved."""


def draw(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Return random values of the initialization of He et al. for a layer before a ReLU."""
    bound = math.sqrt(6 / shape[-1])
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


class VeRAOperator(LowRankOperator):
    """The trained vectors of one site, and a reference to the matrices that all sites share."""

    def __init__(self, site: Site, config: VeRAConfig, basis: Shared) -> None:
        super().__init__(site, config.dropout)
        self.basis = basis
        self.inputs, self.columns = (site.in_features, *site.kernel), columns(site)
        self.d = nn.Parameter(torch.full((*site.batch, config.rank), config.d_initial))
        self.b = nn.Parameter(torch.zeros(*site.batch, site.out_features))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        rank, out = self.d.shape[-1], self.b.shape[-1]
        A, B = self.basis.module.A[:rank, : self.columns], self.basis.module.B[:out, :rank]
        A = (self.d.unsqueeze(-1) * A.to(self.d)).unflatten(-1, self.inputs)
        return A, self.b.unsqueeze(-1) * B.to(self.b), 1.0

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Run the layer. The vectors scale activations, so their gradients need no tensor of the size of A or B."""
        rank, out = self.d.shape[-1], self.b.shape[-1]
        A = self.basis.module.A[:rank, : self.columns].unflatten(-1, self.inputs)
        B = self.basis.module.B[:out, :rank]
        factors = ScaledFactors(A, self.d, B, self.b)
        return scaled_update(self.layer, call, x, factors, self.input_dropout if self.training else 0.0)


class VeRA(Method):
    """Vector-based random matrix adaptation."""

    name = "vera"
    Config = VeRAConfig
    tags = Tags(category="reparameterized", paper="2310.11454", mergeable=True, low_rank=True)
    learning_rate = LearningRate(1e-2, "arXiv 2310.11454, table 8", on="RoBERTa-large, SST-2")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: VeRAConfig, surgeon: Surgeon) -> None:
        graft_between(surgeon, config, VeRAOperator, draw)

    @staticmethod
    def parameter_count(site: Site, config: VeRAConfig) -> int:
        return math.prod(site.batch) * (config.rank + site.out_features)
