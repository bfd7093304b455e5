"""MiCA: minor component adaptation.   Rüdiger and Raschka 2026, arXiv 2604.01694.

Equation:
    W = U S V',   B = U[:, -r:] of the r smallest singular values, frozen
    y = W x + b + s B A dropout(x),   s = alpha / rank

MiCA is a LoRA that trains only A. Its outputs are along the smallest singular directions of the weight, which the base
hardly uses. A depends on B, and a decomposition on another machine would give a different B, at least in its signs. So
B is saved in the adapter's file. In peftcore, the largest entry of each column of B is positive. Kernels of
convolutions are decomposed as [out, in * kernel], embeddings as [dim, num], and each expert separately. A rank above
that of the weight is reduced.

Parameters: rank * in * kernel a site, times the number of experts; rank at most that of the weight.

Start: A at zero: the identity.

Differs from the authors' code: No difference is known. The authors' code was not compared; peft was. peft supports
linear layers and embeddings, and refuses a rank above that of the weight. The signs of its B depend on the machine.

Use it: `peftcore.apply(model, "mica")`, instead of LoRA where new knowledge must not overwrite that of the base, or to
halve the number of parameters.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore_reparameterized._decomposed import as_matrix, positive, rank_within
from peftcore_reparameterized._low_rank import LowRankOperator


class MiCAConfig(MethodConfig):
    """Options of MiCA."""

    method: Literal["mica"] = "mica"
    rank: PositiveInt = 16
    """Number of the smallest singular directions that are used; at most that of the weight."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""


class MiCAOperator(LowRankOperator):
    """The trained A of one site, and the frozen directions of its weight."""

    padded, scaled = frozenset({"A", "B"}), frozenset({"B"})
    B: Tensor

    def __init__(self, site: Site, config: MiCAConfig) -> None:
        super().__init__(site, config.dropout)
        self.scale = config.alpha / config.rank
        rank = rank_within(site, config.rank)
        U = torch.linalg.svd(as_matrix(site), full_matrices=False).U[..., -rank:]
        sign = positive(U.gather(-2, U.abs().argmax(-2, keepdim=True)))  # [*batch, 1, rank]
        self.register_buffer("B", (U * sign).contiguous())
        self.A = nn.Parameter(torch.zeros(*site.batch, rank, site.in_features, *site.kernel))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.A, self.B, self.scale


class MiCA(Method):
    """Minor component adaptation."""

    name = "mica"
    Config = MiCAConfig
    tags = Tags(category="reparameterized", paper="2604.01694", mergeable=True, low_rank=True)
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: MiCAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, MiCAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: MiCAConfig) -> int:
        inputs = site.in_features * math.prod(site.kernel)
        return math.prod(site.batch) * rank_within(site, config.rank) * inputs
