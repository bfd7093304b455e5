"""HiRA: Hadamard high-rank adaptation.   Huang et al. 2025, ICLR 2025, OpenReview TwJrTz9cRS (hqsiswiliam/hira).

    W' = W + W (o) (B A),   (o) entry by entry,   A [rank, in] uniform in +-1/sqrt(in),   B [out, rank] zero

The product of entries has up to rank * rank(W) directions, far more than LoRA's `rank`, for as many parameters. There
is no scale. An entry that is zero stays zero, so pruned weights stay pruned. The authors' code and peft have no factor
before the product either; peft can drop inputs of the update, which the authors' forward does not.

Convolutions: A [rank, in, *kernel], in grouped ones too (peft refuses those). Embeddings: A [rank, num] zero and B ~
N(0, 1), as in peft, since every input picks a single column of A. Stacked experts have factors of their own each.

Parameters: rank * (in * kernel + out) a site, times the number of experts.

Use it where LoRA's rank is the limit, as in reasoning and long answers, and a step may cost a pass over the weight.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore import Method, MethodConfig, Site, Surgeon, Tags, WeightOperator
from peftcore_reparameterized._low_rank import low_rank_count, low_rank_factors, low_rank_update


class Config(MethodConfig):
    """Options of HiRA."""

    method: Literal["hira"] = "hira"
    rank: PositiveInt = 32
    """Rank of what the weight is multiplied with."""


class HiRAOperator(WeightOperator):
    """Multiplies each entry of the weight by one plus an entry of a low-rank product."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        self.A, self.B = low_rank_factors(site, config.rank)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight * low_rank_update(self.A, self.B, weight)  # 1 + BA would lose what is small beside 1


class HiRA(Method):
    """Hadamard high-rank adaptation."""

    name = "hira"
    Config = Config
    tags = Tags(
        category="reparameterized",
        paper="ICLR 2025, OpenReview TwJrTz9cRS",
        mergeable=True,
        checked_against="peft 0.21",
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, HiRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        return low_rank_count(site, config.rank)
