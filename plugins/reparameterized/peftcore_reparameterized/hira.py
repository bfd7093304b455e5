"""HiRA: Hadamard high-rank adaptation.   Huang et al. 2025, ICLR 2025, OpenReview TwJrTz9cRS (hqsiswiliam/hira).

Equation:
    W' = W + W (o) (B A),   (o) entry by entry,   A [rank, in],   B [out, rank]

The product of entries has up to rank * rank(W) directions, far more than LoRA's `rank`, for as many parameters. The
product is not scaled, as in the authors' code and peft. An entry that is zero remains zero, so pruned weights remain
pruned. With `dropout`, inputs of the added term are dropped, as in peft: W x + (W (o) (B A)) dropout(x).

Convolutions: A [rank, in, *kernel], in grouped ones too. Embeddings: A [rank, num]. Each stacked expert has separate
factors.

Parameters: rank * (in * kernel + out) a site, times the number of experts.

Start: A uniform in +-1/sqrt(in), B at zero; of embeddings A at zero and B ~ N(0, 1), as in peft, since every input
picks a single column of A: the identity.

Differs from the authors' code: The authors' forward drops no inputs. peft refuses grouped convolutions.

Use it: `peftcore.apply(model, "hira")`, where the rank of LoRA limits the quality, as in reasoning and long answers.
Each step costs a pass over the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftcore.author import (
    MATRICES,
    Held,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
    WeightOperator,
)
from peftcore_reparameterized._low_rank import (
    check_in_weight_form,
    input_dropout,
    low_rank_count,
    low_rank_factors,
    low_rank_update,
)


class HiRAConfig(MethodConfig):
    """Options of HiRA."""

    method: Literal["hira"] = "hira"
    rank: PositiveInt = 32
    """Rank of the matrix that multiplies the weight."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""


class HiRAOperator(WeightOperator):
    """Multiplies each entry of the weight by one plus an entry of a low-rank product."""

    padded = frozenset({"A", "B"})

    def __init__(self, site: Site, config: HiRAConfig) -> None:
        super().__init__(site)
        self.dropout = input_dropout(site, config.dropout)
        self.A, self.B = low_rank_factors(site, config.rank)

    def prefers_activation_form(self, x: Tensor) -> bool:
        return self.training and self.dropout > 0

    def prepare(self, held: Held) -> Held:
        """Return `held`, the weight and bias of the host, which `activation_form` uses directly."""
        return held

    def activation_form(self, call: Callable[..., Tensor], x: Tensor, prepared: Held) -> Tensor:
        dropped = F.dropout(x, self.dropout)

        def added(A: Tensor, B: Tensor) -> Tensor:
            weight = prepared.weight
            return self.layer.apply(dropped, weight * low_rank_update(A, B, weight).to(weight.dtype))

        # computed again in backward, which keeps no matrix of the weight's size
        return call(x) + checkpoint(added, self.A, self.B, use_reentrant=False)

    def forward(self, weight: Tensor) -> Tensor:
        check_in_weight_form(self, self.dropout)
        return self.merged(weight)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + weight * low_rank_update(self.A, self.B, weight)  # 1 + BA would lose what is small beside 1


class HiRA(Method):
    """Hadamard high-rank adaptation."""

    name = "hira"
    Config = HiRAConfig
    tags = Tags(category="reparameterized", paper="ICLR 2025, OpenReview TwJrTz9cRS", mergeable=True)
    learning_rate = LearningRate(1e-3, "hqsiswiliam/hira@f75f0cf, README.md", on="Llama-3-8B, commonsense")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: HiRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, HiRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: HiRAConfig) -> int:
        return low_rank_count(site, config.rank)
