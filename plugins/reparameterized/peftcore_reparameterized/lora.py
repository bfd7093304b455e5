"""LoRA: low-rank adaptation.   Hu et al. 2021, arXiv 2106.09685.

    y = W x + b + s B A dropout(x),   s = alpha / rank,   A [rank, in] uniform in +-1/sqrt(in),   B [out, rank] zero

Convolutions: A is a convolution to `rank` channels and B mixes them, delta[o, i, k] = s sum_r B[o, r] A[r, i, k]; in a
grouped one, i counts inside the group of o. With `across_groups`, as in peft, A reads all channels there and B mixes
inside each group, B [out, rank / groups]: no grouped weight computes that, so it does not merge. Embeddings: A [rank,
num] zero and B ~ N(0, 1), as in loralib, since every input picks a single column of A. Each stacked expert has separate
factors.

scaling="sqrt_rank" is rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): s = alpha / sqrt(rank), with which outputs and
gradients have the same size at any rank. Use it at ranks of 64 and more; alpha / rank makes those learn too slowly.

start="orthogonal" (https://datta0.github.io/posts/rethink-lora-init) has two factors that are not zero, and B A = 0 up
to rounding: with Q [rank, rank] orthogonal and R, T ~ N(0, 1), A = (R Q[0::2])' / 10 and B = T Q[1::2] / 10. Both
factors get gradients from the first step on. The rank is even.

trained="B" is LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): A stays as it was drawn, so nothing of x is kept for its
gradient. The optimizer of `injection.optimizer` gets g (A A')^+ / s^2 for B's gradient g, which makes s g A the nearest
to the gradient of W; it is computed in g's dtype, where peft's optimizer rounds a product to bfloat16. Embeddings start
with a zero A, so B would never train (as happens in peft): there it is refused.

`damping` is Riemannian preconditioned LoRA (Zhang and Pilanci 2024, arXiv 2402.02347): the optimizer of
`injection.optimizer` gets inv(B' B + d I) g for A's gradient g and g inv(A A' + d I) for B's, both by the factors
before the step; with d = 0 a step of SGD changes B A alike however it is split. In peft only linear layers support it.

Parameters: rank * (in * kernel + out) a site, times the number of experts; with trained="B" rank * out; with
`across_groups` in is that of all groups, and out that of one.

Use it first: it merges, adds no latency then, and suits nearly every task. More sites help more than more rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self, cast

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    AppliedMethod,
    GradientRule,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Share,
    Site,
    Surgeon,
    Tags,
    low_rank,
)
from peftcore_reparameterized._across_groups import AcrossGroups, across_count, around, groups_of
from peftcore_reparameterized._fixed_projection import fix_projection
from peftcore_reparameterized._low_rank import (
    add_low_rank,
    input_dropout,
    low_rank_count,
    low_rank_factors,
    orthogonal_factors,
)
from peftcore_reparameterized._preconditioned import Preconditioned, Preconditioner, fixed_projection, riemannian


class LoRAConfig(MethodConfig):
    """Options of LoRA."""

    method: Literal["lora"] = "lora"
    rank: PositiveInt = 8
    """Rank of the update."""
    alpha: PositiveFloat = 8.0
    """Numerator of the scale ``alpha / rank``: change the rank without touching the learning rate."""
    scaling: Literal["rank", "sqrt_rank"] = "rank"
    """Denominator of the scale: the rank, or its square root (rsLoRA)."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    start: Literal["zero", "orthogonal"] = "zero"
    """The start that makes the update zero: one factor is zero, or the two are orthogonal to each other."""
    trained: Literal["both", "B"] = "both"
    """The factors that train: both, or B alone (LoRA-FA)."""
    damping: NonNegativeFloat | None = None
    """The damping of the Riemannian preconditioner of both gradients; without, gradients stay as they are."""
    across_groups: bool = False
    """In grouped convolutions, let A read the channels of all groups (as peft); of no effect on other layers."""

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.start == "orthogonal" and self.rank % 2:
            raise ValueError(f"start='orthogonal' halves the rank, and {self.rank} is odd: take an even one")
        if self.trained == "B" and self.damping is not None:
            raise ValueError("damping is for two factors that train, and trained='B' has a rule of its own: leave one")
        return self


def scale_of(config: LoRAConfig) -> float:
    """Return the factor of the update."""
    return config.alpha / (config.rank if config.scaling == "rank" else math.sqrt(config.rank))


class LoRAOperator(Operator):
    """The update of one target module. Shapes are those of a linear layer; `layer` knows those of the others."""

    factors_are_parameters = True
    stackable = True
    padded, scaled = frozenset({"A", "B"}), frozenset({"B"})

    A: Tensor

    def __init__(self, site: Site, config: LoRAConfig, start: str = "zero", trained: str = "both") -> None:
        super().__init__(site)
        self.input_dropout = input_dropout(site, config.dropout)
        self.scale = scale_of(config)
        factors = orthogonal_factors if start == "orthogonal" else low_rank_factors
        self.A, self.B = factors(site, config.rank)  # [rank, in], [out, rank]
        if trained == "B":
            fix_projection(self, site)

    @low_rank
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:  # x [..., in]
        y = call(x)  # [..., out]: W x + b
        A, B = self.cast(y, self.A, self.B)
        dropped = F.dropout(x, self.input_dropout) if self.training and self.input_dropout else x
        low = self.layer.apply(dropped, A)  # [..., rank]: A x
        return y + self.layer.mix(self.scale * low, B)  # [..., out]: B (s A x)

    def merged(self, weight: Tensor) -> Tensor:  # [*batch, out, in, *kernel]
        return add_low_rank(weight, self.A, self.scale * self.B)  # W + s B A

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.A, self.B, self.scale


class LoRA(Method):
    """Low-rank adaptation."""

    name = "lora"
    Config = LoRAConfig
    tags = Tags(category="reparameterized", paper="2106.09685", mergeable=True, low_rank=True)
    learning_rate = LearningRate(
        5e-4, "microsoft/LoRA@c4593f0, examples/NLU/roberta_base_mnli.sh", on="RoBERTa-base, MNLI"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: LoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            if config.at(site.path).across_groups and groups_of(site) > 1:
                surgeon.graft(
                    around(site), lambda at, own: AcrossGroups(at, own.rank, scale_of(own), own.dropout), config
                )
            else:
                surgeon.graft(site, lambda at, own: LoRAOperator(at, own, own.start, own.trained), config)

    def gradient_rule(self, injection: AppliedMethod) -> GradientRule | None:
        of: dict[nn.Parameter, Preconditioner] = {}
        for graft in (each for each in injection.grafts if isinstance(each.operator, LoRAOperator)):
            damping = cast(LoRAConfig, injection.config.at(graft.site.path)).damping
            if not isinstance(graft.operator.A, nn.Parameter):
                of |= fixed_projection(graft.operator)
            elif damping is not None:
                of |= riemannian(graft.operator, damping)
        return Preconditioned(of) if of else None

    @staticmethod
    def parameter_count(site: Site, config: LoRAConfig) -> int:
        if config.across_groups and groups_of(site) > 1:
            return across_count(site, config.rank)
        if config.trained == "B":
            return math.prod(site.batch) * config.rank * site.out_features
        return low_rank_count(site, config.rank)
