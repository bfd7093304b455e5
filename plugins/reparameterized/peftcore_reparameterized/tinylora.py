"""TinyLoRA: low-rank adapters of a few numbers.   Morris et al. 2026, arXiv 2602.04118.

Equation:
    W = U S V',   B = U_r sqrt(S_r),   A = sqrt(S_r) V_r'      of the r largest singular values, frozen
    y = W x + b + B (sum_i v_i P_i) A dropout(x),   v [u],   P_i [r, r] ~ N(0, 1/r), frozen

Consecutive sites form groups, and the sites of a group share one v. There are ``round(sites * (1 - tying))`` groups, at
least one: with tying=0 each site has a separate v, and with tying=1 all sites share one. The P_i of a site are drawn
from `projection_seed` plus the index of the site.

Kernels of convolutions are decomposed as [out, in * kernel], embeddings as [dim, num], and each expert separately. Each
expert has a separate P; the experts of a site share v.

A and B are saved in the adapter's file, because a decomposition on another machine would give different factors, at
least by rounding. P is saved only with `store_basis`, because it can be drawn again. Its numbers are the same as in
peft, for the same seed and sites.

Parameters: u for each group; u = 1 is possible.

Start: v at zero: the identity.

Differs from the authors' code: The authors published no code, so this method follows peft. In peft, both factors
contain the roots of the singular values. In the paper one factor contains all of them, U S (sum_i v_i P_i) V'.

Use it: `peftcore.apply(model, "tinylora")`, where even LoRA-XS is too large, above all in reinforcement learning. Use a
large learning rate.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, Method, MethodConfig, Share, Shared, Site, Surgeon, Tags
from peftcore_reparameterized._decomposed import as_matrix, as_rows, principal, rank_within
from peftcore_reparameterized._low_rank import LowRankOperator


class TinyLoRAConfig(MethodConfig):
    """Options of TinyLoRA."""

    overridable = ("rank", "dropout")

    method: Literal["tinylora"] = "tinylora"
    rank: PositiveInt = 2
    """Number of singular directions that the matrix between A and B mixes; at most that of the weight."""
    u: PositiveInt = 64
    """Number of trained values of a group."""
    tying: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Degree of sharing between sites. With 0 each site has a vector; with 1 there is one vector for all."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    projection_seed: NonNegativeInt = 42
    """Seed of P at the first site. The seed of each following site is larger by 1."""
    store_basis: bool = False
    """Save P in files. A P loaded from another library's file is always saved."""


class Vector(nn.Module):
    """The vector v ``[u]`` that a group trains."""

    def __init__(self, u: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(u))


class TinyLoRAOperator(LowRankOperator):
    """The frozen factors A and B of one site, and its frozen matrices P. Their weights are the vector v of the
    group."""

    A: Tensor
    B: Tensor
    P: Tensor

    def __init__(self, site: Site, config: TinyLoRAConfig, number: int, vector: Shared) -> None:
        super().__init__(site, config.dropout)
        self.vector = vector
        rank = rank_within(site, config.rank)
        U, S, V = principal(as_matrix(site), rank)
        self.register_buffer("A", as_rows(site, S.sqrt().unsqueeze(-1) * V).contiguous())
        self.register_buffer("B", (U * S.sqrt().unsqueeze(-2)).contiguous())
        generator = torch.Generator().manual_seed(config.projection_seed + number)
        P = torch.empty(*site.batch, config.u, rank, rank).normal_(0, 1 / math.sqrt(rank), generator=generator)
        self.register_buffer("P", P.mT.contiguous() if site.layer.one_hot else P, persistent=config.store_basis)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        R = (self.vector.module.v[:, None, None] * self.P).sum(-3)  # [*batch, rank, rank]
        return self.A, self.B @ R, 1.0


def group_of(number: int, sites: int, tying: float) -> int:
    """Return the group of a site by its index among all sites."""
    groups = max(1, round(sites * (1 - tying)))
    return min(number // max(1, sites // groups), groups - 1)


class TinyLoRA(Method):
    """Low-rank adaptation that trains only a few numbers."""

    name = "tinylora"
    Config = TinyLoRAConfig
    tags = Tags(category="reparameterized", paper="2602.04118", mergeable=True, low_rank=True)
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: TinyLoRAConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        for number, site in enumerate(sites):
            name = f"v_{group_of(number, len(sites), config.tying)}"
            vector = surgeon.own(name, partial(Vector, config.u))
            surgeon.graft(site, TinyLoRAOperator, config, number=number, vector=vector)

    @staticmethod
    def parameter_count(site: Site, config: TinyLoRAConfig) -> int:
        return 0
