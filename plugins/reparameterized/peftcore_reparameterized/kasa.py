"""KaSA: knowledge-aware singular-value adaptation.   Wang et al. 2024, arXiv 2412.06071 (juyongjiang/KaSA).

Equation:
    W = U S V',   W' = W - U_r S_r V_r' of the r smallest singular values
    y = W' x + b + s B diag(d) A dropout(x),   s = alpha / rank
    loss + mean over the target modules of  beta |d|^2 + gamma (|B'B - I|_F + |A A' - I|_F)

The smallest singular directions of the base are removed as noise. An update in the form of a singular value
decomposition is trained in their place. Additional losses keep the factors of the update near orthonormal, and its
singular values d small. The base is unchanged, and the removed part is stored in the frozen buffers A0 and B0. So the
adapter can be removed, and fits the original base.

The losses are always added in training. Each expert has separate factors, and kernels are matrices [out, in * kernel].

Parameters: rank * (in * kernel + out + 1) a site, times the number of experts; rank is less than the smaller dimension
of the weight.

Start: B at zero, A as in LoRA, d ~ N(0, 1). The removed part changes outputs a little, so a fresh adapter is not an
identity.

Differs from the authors' code: The authors' code and peft write W' into the base permanently. The losses of a module
are those of the paper and of peft. peft computes their sum over the modules, which users must add to the loss
themselves (`_get_kasa_loss`). Here it is their mean, as in the authors' code, for which the values of beta and gamma
were chosen. In the authors' code, the losses contain A'A - I [in, in] and B B' - I [out, out] instead of B'B - I and A
A' - I. Those can never be zero. The authors' code keeps the `in` - r largest components, which removes nothing from a
weight with at most `in` - r outputs. Here the r smallest of the existing components are removed, as in the paper and in
peft.

Use it: `peftcore.apply(model, "kasa")`, where LoRA forgets or overfits. Tune `beta` and `gamma` first, which the
authors choose for each task.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, AppliedMethod, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._decomposed import as_matrix, as_rows, positive, rank_within
from peftcore_reparameterized._low_rank import LowRankOperator, input_dropout, low_rank_count, low_rank_factors


class KaSAConfig(MethodConfig):
    """Options of KaSA."""

    method: Literal["kasa"] = "kasa"
    rank: PositiveInt = 8
    """Rank of the update, and number of singular values that are removed."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    beta: NonNegativeFloat = 1e-4
    """Weight of the loss of d."""
    gamma: NonNegativeFloat = 1e-3
    """Weight of the loss of A and B."""


def rank_of(site: Site, config: KaSAConfig) -> int:
    """Return the rank of the update.

    Raises:
        UnsupportedSite: the weight has a single singular direction, which would be removed.
    """
    if not (rank := min(config.rank, rank_within(site, config.rank + 1) - 1)):
        raise UnsupportedSite(f"{site.path} has a single singular direction, so no part of it would remain; exclude it")
    return rank


class KaSAOperator(LowRankOperator):
    """The update of one site, and the frozen factors of the part that is removed from its weight: B0 = U_r S_r, A0 =
    V_r'."""

    padded, scaled = frozenset({"A", "B", "d", "A0", "B0"}), frozenset({"B"})
    A0: Tensor
    B0: Tensor

    def __init__(self, site: Site, config: KaSAConfig) -> None:
        super().__init__(site)
        self.dropout, self.scale = input_dropout(site, config.dropout), config.alpha / config.rank
        rank = rank_of(site, config)
        self.A, self.B = low_rank_factors(site, rank)
        self.d = nn.Parameter(torch.randn(*site.batch, rank))
        U, S, V = torch.linalg.svd(as_matrix(site), full_matrices=False)
        U, S, V = U[..., -rank:], S[..., -rank:], V[..., -rank:, :]
        sign = positive(U.gather(-2, U.abs().argmax(-2, keepdim=True)))  # [*batch, 1, rank]
        self.register_buffer("A0", as_rows(site, V * sign.mT).contiguous())
        self.register_buffer("B0", (U * sign * S.unsqueeze(-2)).contiguous())

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Run the layer. In training, dropout acts on inputs of the trained update only, not on inputs of the removed
        part."""
        if not (self.training and self.dropout):
            return super().forward(call, x)
        y = call(x)
        A, B, d, A0, B0 = self.cast(y, self.A, self.B, self.d, self.A0, self.B0)
        y = y + self.layer.mix(self.scale * self.layer.apply_dropped(x, A, self.dropout), B * d.unsqueeze(-2))
        return y - self.layer.mix(self.layer.apply(x, A0), B0)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        A = torch.cat([self.A, self.A0], self.layer.batch_dims)  # [*batch, 2 rank, in, *kernel]
        return A, torch.cat([self.B * self.d.unsqueeze(-2), -self.B0 / self.scale], -1), self.scale

    def losses(self, beta: float, gamma: float) -> Tensor:
        """Return the sum of the losses for each expert, [*batch]: of the singular values d, and of the deviation of A
        and B from orthonormal factors."""
        A, one = self.A.flatten(self.d.dim()), torch.eye(self.d.shape[-1]).to(self.d)  # A: [*batch, rank, in * kernel]
        apart = torch.linalg.matrix_norm(self.B.mT @ self.B - one) + torch.linalg.matrix_norm(A @ A.mT - one)
        return beta * self.d.square().sum(-1) + gamma * apart


class KaSA(Method):
    """Knowledge-aware singular-value adaptation."""

    name = "kasa"
    Config = KaSAConfig
    tags = Tags(category="reparameterized", paper="2412.06071", mergeable=True, identity_at_init=False, low_rank=True)
    learning_rate = LearningRate(4e-4, "juyongjiang/KaSA@f85e88c, README.md", on="RoBERTa-base, CoLA")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: KaSAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, KaSAOperator, config)

    def aux_loss(self, injection: AppliedMethod) -> Tensor | None:
        config = injection.config
        if not (config.beta or config.gamma):
            return None
        operators = [each for each in injection.operators.values() if isinstance(each, KaSAOperator)]
        return torch.cat([each.losses(config.beta, config.gamma).flatten() for each in operators]).mean()

    @staticmethod
    def parameter_count(site: Site, config: KaSAConfig) -> int:
        rank = rank_of(site, config)
        return low_rank_count(site, rank) + math.prod(site.batch) * rank
