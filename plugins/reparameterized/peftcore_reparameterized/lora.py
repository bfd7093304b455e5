"""LoRA: low-rank adaptation.   Hu et al. 2021, arXiv 2106.09685.

Equation:
    y = W x + b + s B A dropout(x),   s = alpha / rank,   A [rank, in],   B [out, rank]

In a convolution, A is a convolution to `rank` channels and B mixes these channels: delta[o, i, k] = s sum_r B[o, r]
A[r, i, k]. In a grouped convolution, i counts the channels in the group of o. With `across_groups`, as in peft, A reads
the channels of all groups, and B [out, rank / groups] mixes inside each group. No grouped weight computes that, so it
cannot be merged. In an embedding, A is [rank, num]. Each stacked expert has separate factors.

scaling="sqrt_rank" is rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): s = alpha / sqrt(rank). With this scale, outputs
and gradients have the same size at any rank. Use it at ranks of 64 and more, which learn too slowly with alpha / rank.

start="orthogonal" (https://datta0.github.io/posts/rethink-lora-init) starts with two factors that are not zero, but
whose product B A is zero up to rounding. With Q [rank, rank] orthogonal and R, T ~ N(0, 1), they are A = (R Q[0::2])' /
10 and B = T Q[1::2] / 10. Both factors get gradients from the first step on. The rank must be even.

trained="B" is LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): A is frozen, so x is not stored for its gradient. The
optimizer of `injection.optimizer` gets g (A A')^+ / s^2 instead of the gradient g of B. This makes s g A as close as
possible to the gradient of W. Embeddings are refused, because their A starts at zero, so B would never train.

`damping` is Riemannian preconditioned LoRA (Zhang and Pilanci 2024, arXiv 2402.02347): the optimizer of
`injection.optimizer` gets inv(B' B + d I) g instead of the gradient g of A, and g inv(A A' + d I) instead of that of B.
d is `damping`, and both use the factors before the step. With d = 0, a step of SGD changes the product B A in the same
way however it is factored.

Parameters: rank * (in * kernel + out) a site, times the number of experts; with trained="B" rank * out; with
`across_groups`, `in` is that of all groups, and `out` that of one group.

Start: A uniform in +-1/sqrt(in), B at zero: the identity. In embeddings A is zero and B ~ N(0, 1), as in loralib, since
every input picks a single column of A. start="orthogonal" is an identity up to rounding.

Differs from the authors' code: No difference is known. The authors' code was not compared; peft was. In peft, the
optimizer of LoRA-FA rounds a product to bfloat16, LoRA-FA never trains embeddings, and only linear layers support the
preconditioner.

Use it: `peftcore.apply(model, "lora")`, as the first choice. It can be merged, adds no latency then, and is suitable
for nearly every task. More target modules help more than a higher rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Self, cast

import torch
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
from peftcore.errors import UnsupportedSite
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
    """Numerator of the scale ``alpha / rank``, which allows you to change the rank without changing the learning
    rate."""
    scaling: Literal["rank", "sqrt_rank"] = "rank"
    """Denominator of the scale: the rank, or its square root (rsLoRA)."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    start: Literal["zero", "orthogonal"] = "zero"
    """How the initial update is made zero: one factor is zero, or the two are orthogonal to each other."""
    trained: Literal["both", "B"] = "both"
    """The factors that train: both, or B alone (LoRA-FA)."""
    damping: NonNegativeFloat | None = None
    """Damping d of the Riemannian preconditioner of both gradients. With None, gradients are not changed."""
    across_groups: bool = False
    """Whether A reads the channels of all groups in grouped convolutions, as in peft. It has no effect on other
    layers."""

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.start == "orthogonal" and self.rank % 2:
            raise ValueError(f"start='orthogonal' halves the rank, and rank={self.rank} is odd: use an even one")
        if self.trained == "B" and self.damping is not None:
            raise ValueError(
                "damping needs two trained factors, and trained='B' trains one with its own rule: remove one of the two"
            )
        return self


def scale_of(config: LoRAConfig) -> float:
    """Return the scale s of the update."""
    return config.alpha / (config.rank if config.scaling == "rank" else math.sqrt(config.rank))


class LoRAOperator(Operator):
    """The update of one target module. Comments give the shapes for a linear layer; for other layers, methods of
    `layer` handle the shapes."""

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
            own = config.at(site.path)
            if own.across_groups and groups_of(site) > 1:
                surgeon.graft(around(site), AcrossGroups, config)
            else:
                surgeon.graft(site, LoRAOperator, config, start=own.start, trained=own.trained)

    def gradient_rule(self, injection: AppliedMethod) -> GradientRule | None:
        of: dict[nn.Parameter, Preconditioner] = {}
        adapted = [(each.site, each.operator) for each in injection.grafts if isinstance(each.operator, LoRAOperator)]
        for site, operator in adapted:
            damping = cast(LoRAConfig, injection.config.at(site.path)).damping
            if not isinstance(operator.A, nn.Parameter):
                of |= fixed_projection(operator)
            elif damping is not None:
                of |= riemannian(operator, damping)
        return Preconditioned(of) if of else None

    @staticmethod
    def parameter_count(site: Site, config: LoRAConfig) -> int:
        if config.across_groups and groups_of(site) > 1:
            return across_count(site, config.rank)
        if config.trained == "B":
            return math.prod(site.batch) * config.rank * site.out_features
        return low_rank_count(site, config.rank)


class AcrossGroups(Operator):
    """The update of a grouped convolution from the channels of all groups: A ``[rank, in * groups, *kernel]``, and B
    ``[out, rank / groups]``, which mixes inside each group. No grouped weight computes that, so it cannot be merged."""

    def __init__(self, site: Site, config: LoRAConfig) -> None:
        super().__init__(site)
        self.groups, self.dropout, self.scale, rank = groups_of(site), config.dropout, scale_of(config), config.rank
        if rank % self.groups:
            raise UnsupportedSite(
                f"{site.path} has {self.groups} groups, which rank={rank} is not a multiple of; set another rank for "
                "it with overrides=, or exclude it"
            )
        inputs = (site.in_features * self.groups, *site.kernel)
        bound = 1 / math.sqrt(math.prod(inputs))
        self.A = nn.Parameter(torch.empty(rank, *inputs).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank // self.groups))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:  # x [..., in, *size]
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else x
        inside = torch.block_diag(*B.unflatten(0, (self.groups, -1)))  # [out, rank]
        return y + self.layer.mix(self.scale * self.layer.apply(dropped, A), inside)


def groups_of(site: Site) -> int:
    """Return the number of groups of a convolution; 1 for other layers, transposed convolutions and padding modes other
    than zeros."""
    if isinstance(site.module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and site.module.padding_mode == "zeros":
        return site.module.groups
    return 1


def around(site: Site) -> Site:
    """Return the site for an operator that wraps the layer, instead of one that changes its weight."""
    return replace(site, form="activation")


def across_count(site: Site, rank: int) -> int:
    """Return the number of parameters of the update of a grouped convolution from the channels of all groups."""
    groups = groups_of(site)
    return rank * groups * site.in_features * math.prod(site.kernel) + rank // groups * site.out_features


def fix_projection(operator: Operator, site: Site) -> None:
    """Make the factor A of an operator a buffer, so that it is not trained.

    Raises:
        UnsupportedSite: A is zero at an embedding, so B alone would never train.
    """
    if site.layer.one_hot:
        raise UnsupportedSite(
            f"{site.path} is an embedding, whose A starts at zero, so B alone would never train; exclude it"
        )
    A = operator.get_tensor("A").detach()
    del operator.A
    operator.register_buffer("A", A)
