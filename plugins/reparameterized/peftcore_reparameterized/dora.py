"""DoRA: weight-decomposed low-rank adaptation.   Liu et al. 2024, arXiv 2402.09353.

    V = W + s B A,   W' = m V / ||V||,   s = alpha / rank

The norm is taken over the inputs, one for each output row (as in the authors' code and in peft; LyCORIS offers the
other axis too), and counts as a constant in backward (section 4.3 of the paper). m [out] starts as ||W||, so that W' =
W at first. A and B start as LoRA's. A row of zeros has no direction; it stays zero.

Parameters: rank * (in * kernel + out) + out a site, times the number of experts.

Use it where LoRA at low rank falls short of full fine-tuning; it costs one pass over the weight in each training step.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore import Method, MethodConfig, Site, Surgeon, Tags, WeightOperator
from peftcore_reparameterized._low_rank import low_rank_count, low_rank_factors, low_rank_update


class Config(MethodConfig):
    """Options of DoRA."""

    method: Literal["dora"] = "dora"
    rank: PositiveInt = 8
    """Rank of the update of the direction."""
    alpha: PositiveFloat = 8.0
    """Numerator of the scale ``alpha / rank``."""


class DoRAOperator(WeightOperator):
    """Direction by a low-rank update, magnitude by a vector."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        self.scale = config.alpha / config.rank
        self.A, self.B = low_rank_factors(site, config.rank)
        weight = site.weight()
        precise = torch.promote_types(weight.dtype, torch.float32)
        self.magnitude = nn.Parameter(self._norm(weight.to(precise)))  # [*batch, out]

    def _norm(self, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight.detach().flatten(self.layer.batch_dims + 1), dim=-1)

    def forward(self, weight: Tensor) -> Tensor:
        direction = weight + self.scale * low_rank_update(self.A, self.B, weight)
        norm = self._norm(direction)
        gain = self.magnitude / torch.where(norm == 0, 1.0, norm)
        return direction * gain.view(*gain.shape, *[1] * (weight.dim() - gain.dim()))


class DoRA(Method):
    """Weight-decomposed low-rank adaptation."""

    name = "dora"
    Config = Config
    tags = Tags(category="reparameterized", paper="2402.09353", mergeable=True, checked_against="peft 0.21")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, DoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        return low_rank_count(site, config.rank) + math.prod(site.batch) * site.out_features
