"""LoRA: low-rank adaptation.   Hu et al. 2021, arXiv 2106.09685.

    y = W x + b + s B A dropout(x),   s = alpha / rank,   A [rank, in] uniform in +-1/sqrt(in),   B [out, rank] zero

Convolutions: A is a convolution to `rank` channels and B mixes them, delta[o, i, k] = s sum_r B[o, r] A[r, i, k]; in a
grouped one, i counts inside the group of o. With `across_groups`, as in peft, A reads all channels there and B mixes
inside each group, B [out, rank / groups]: no grouped weight computes that, so it does not merge. Embeddings: A [rank,
num] zero and B ~ N(0, 1), as in loralib, since every input picks a single column of A. Stacked experts have factors of
their own each.

scaling="sqrt_rank" is rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): s = alpha / sqrt(rank), with which outputs and
gradients have the same size at any rank. Use it at ranks of 64 and more; alpha / rank makes those learn too slowly.

Parameters: rank * (in * kernel + out) a site, times the number of experts; with `across_groups` in is that of all
groups, and out that of one.

Use it first: it merges, adds no latency then, and suits nearly every task. More sites help more than more rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore import MATRICES, LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags, low_rank
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._low_rank import add_low_rank, input_dropout, low_rank_count, low_rank_factors


class Config(MethodConfig):
    """Options of LoRA."""

    method: Literal["lora"] = "lora"
    rank: PositiveInt = 8
    """Rank of the update."""
    alpha: PositiveFloat = 8.0
    """Numerator of the scale ``alpha / rank``: change the rank without touching the learning rate."""
    scaling: Literal["rank", "sqrt_rank"] = "rank"
    """Denominator of the scale: the rank, or its square root (rsLoRA)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability with which inputs of the update are dropped in training."""
    across_groups: bool = False
    """In grouped convolutions, let A read the channels of all groups (as peft); of no effect on other layers."""


def scale_of(config: Config) -> float:
    """Return the factor of the update."""
    return config.alpha / (config.rank if config.scaling == "rank" else math.sqrt(config.rank))


class LoRAOperator(Operator):
    """The update of one target module. Shapes are those of a linear layer; `layer` knows those of the others."""

    factors_are_parameters = True
    stackable = True
    padded, scaled = frozenset({"A", "B"}), frozenset({"B"})

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        self.input_dropout = input_dropout(site, config.dropout)
        self.scale = scale_of(config)
        self.A, self.B = low_rank_factors(site, config.rank)  # [rank, in], [out, rank]

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


class AcrossGroups(Operator):
    """The update of a grouped convolution from the channels of all groups."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        self.groups = _groups(site)
        if config.rank % self.groups:
            raise UnsupportedSite(f"{site.path} has {self.groups} groups, which a rank of {config.rank} does not fill")
        self.dropout, self.scale = config.dropout, scale_of(config)
        inputs, own = (site.in_features * self.groups, *site.kernel), config.rank // self.groups
        bound = 1 / math.sqrt(math.prod(inputs))
        self.A = nn.Parameter(torch.empty(config.rank, *inputs).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(site.out_features, own))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:  # x [..., in, *size]
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else x
        inside = torch.block_diag(*B.unflatten(0, (self.groups, -1)))  # [out, rank]
        return y + self.layer.mix(self.scale * self.layer.apply(dropped, A), inside)


class LoRA(Method):
    """Low-rank adaptation."""

    name = "lora"
    Config = Config
    tags = Tags(category="reparameterized", paper="2106.09685", mergeable=True, low_rank=True)
    learning_rate = LearningRate(
        5e-4, "microsoft/LoRA@c4593f0, examples/NLU/roberta_base_mnli.sh", on="RoBERTa-base, MNLI"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            if config.at(site.path).across_groups and _groups(site) > 1:
                surgeon.graft(replace(site, form="activation"), AcrossGroups, config)
            else:
                surgeon.graft(site, LoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        groups = _groups(site) if config.across_groups else 1
        if groups == 1:
            return low_rank_count(site, config.rank)
        inputs = groups * site.in_features * math.prod(site.kernel)
        return config.rank * inputs + config.rank // groups * site.out_features


def _groups(site: Site) -> int:
    """Return how many groups a convolution has; one of other layers, and of those whose channels are not in groups by
    themselves (transposed ones, and paddings of their own)."""
    plain = isinstance(site.module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and site.module.padding_mode == "zeros"
    return site.module.groups if plain else 1
