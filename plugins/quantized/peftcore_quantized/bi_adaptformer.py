"""Bi-AdaptFormer: an adapter of one bit a weight.   Jie et al. 2023, arXiv 2307.16867 (JieShibo/PETL-ViT).

Equation:
    out = MLP(LN(x)) + s U' dropout(relu(D' x)) + x,   w' = std(w) c((w - mean(w)) / (std(w) + 1e-5)) + mean(w)

D [r, d] and U [d, r] train in floating point, and every forward rounds both. An entry of a matrix becomes one of 2^bits
codes c, multiplied by the standard deviation of the matrix, plus its mean. With one bit, c = +-0.6745. Backward treats
the rounding as the identity, and differentiates mean and deviation. x is the residual stream before the norm of the
feed-forward. D and U have no bias. The model's changes to the feed-forward's output (layer scale, stochastic depth) do
not apply to the adapter's output. Files contain D and U in floating point, although a trained adapter needs only their
codes and two numbers per matrix.

The model may be dense or quantized. The adapter cannot be merged. Parameters: 2 d r a block.

Start: D as in nn.Linear. U from a normal distribution of standard deviation 0.001, cut at 0.002. A rounded U is never
zero, so a fresh adapter changes the output a little.

Differs from the authors' code: No difference is known.

Use it: `peftcore.apply(model, "bi_adaptformer")`, to store one adapter for each of many tasks of an image transformer.
Search s from 0.01 to 100 as the authors do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.author import (
    OUTPUTS,
    BranchSite,
    Bypass,
    Joins,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Surgeon,
    Tags,
    branch,
)


class BiAdaptFormerConfig(MethodConfig):
    """Options of Bi-AdaptFormer."""

    method: Literal["bi_adaptformer"] = "bi_adaptformer"
    bottleneck: PositiveInt = 32
    """Width r of the bottleneck."""
    bits: Annotated[int, Field(ge=1, le=4)] = 1
    """Number of bits of each weight of the adapter."""
    scale: PositiveFloat = 1.0
    """The factor s in front of the adapter."""
    joins: Joins = "stream"
    """Where the adapter's output is added: to the residual stream, after the host's changes to the feed-forward's
    output (dropout, layer scale, stochastic depth), or to the output of the feed-forward's last matrix, before these
    changes."""
    dropout: Share = 0.1
    """Probability with which entries of the bottleneck are dropped in training, as in the authors' code."""


class BiAdaptFormerOperator(Bypass):
    """The bottleneck in parallel with one feed-forward."""

    def __init__(self, site: BranchSite, config: BiAdaptFormerConfig) -> None:
        super().__init__(site)
        self.scale = config.scale
        self.levels = tuple(normal_codes(config.bits).tolist())  # numbers, which a compiler does not look into
        self.down = nn.Parameter(torch.empty(config.bottleneck, site.width))
        self.up = nn.Parameter(torch.empty(site.out_features, config.bottleneck))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.trunc_normal_(self.up, std=0.001, a=-0.002, b=0.002)

    def beside(self, x: Tensor) -> Tensor:
        down, up = self.cast(x, in_bits(self.down, self.levels), in_bits(self.up, self.levels))
        inner = self.dropout(torch.relu(F.linear(x, down)))  # [..., r]
        return self.scale * F.linear(inner, up)


class BiAdaptFormer(Method):
    """A bottleneck of a few bits in parallel with each feed-forward."""

    name = "bi_adaptformer"
    Config = BiAdaptFormerConfig
    tags = Tags(
        category="quantized",
        paper="2307.16867",
        identity_at_init=False,
        random=True,
        exact_gradient=False,  # straight through the rounding
    )
    learning_rate = LearningRate(1e-3, "JieShibo/PETL-ViT@026e4f1, binary_adapter/main.py", on="ViT-B/16, VTAB-1k")
    target = ("mlp.output",)
    alternatives = OUTPUTS

    config_version = 2
    former_defaults = ({"joins": "matrix", "dropout": 0.0},)

    def inject(self, model: nn.Module, config: BiAdaptFormerConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            place = branch(surgeon, site, before_norm=True, joins=config.at(site.path).joins)
            surgeon.graft(place, BiAdaptFormerOperator, config, place.places)

    @staticmethod
    def parameter_count(site: BranchSite, config: BiAdaptFormerConfig) -> int:
        return (site.width + site.out_features) * config.bottleneck


ROUNDS = 500
"""Number of iterations by which the codes are computed, as in the authors' code. Codes of up to four bits have
converged by then; those of eight bits have not."""


@functools.cache
def normal_codes(bits: int) -> Tensor:
    """Return the ``2^bits`` codes of a standard normal distribution, in ascending order and in float64. Each code is
    the median of its cell, and the border of two cells is halfway between their codes."""
    codes = torch.zeros(2**bits, dtype=torch.float64, device="cpu")
    ends = codes.new_zeros(1), codes.new_ones(1)
    for _ in range(ROUNDS):
        below = torch.cat([ends[0], torch.special.ndtr((codes[1:] + codes[:-1]) / 2), ends[1]])
        codes = torch.special.ndtri((below[1:] + below[:-1]) / 2)
    return codes


def in_bits(weight: Tensor, levels: Sequence[float]) -> Tensor:
    """Return a matrix rounded to its codes (of `normal_codes`), which are scaled by its standard deviation and shifted
    by its mean. The result is in float32 or better. Each matrix of a batch has a separate mean and deviation."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    deviation, mean = torch.std_mean(weight, (-2, -1), keepdim=True)
    unit = (weight - mean) / (deviation + 1e-5)
    codes = torch.tensor(levels, dtype=unit.dtype, device=unit.device)
    chosen = codes[torch.bucketize(unit.detach(), (codes[1:] + codes[:-1]) / 2)]
    return (unit + (chosen - unit).detach()) * deviation + mean
