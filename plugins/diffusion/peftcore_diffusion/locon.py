"""LoCon: LoRA for all layers of a diffusion model, with a separate rank for convolutions.   Yeh et al. 2023, arXiv
2309.14859.

Equation:
    y = W x + b + s U D x,   s = alpha / rank,   delta[o, i, k] = s sum_r U[o, r] D[r, i, k]
    with `use_tucker`   delta[o, i, k] = s sum_pq U[o, p] M[p, q, k] D[q, i]

In a grouped convolution i is the index inside the group of o. `conv_rank` and `conv_alpha` apply to kernels larger than
1x1. Linear layers and 1x1 convolutions use `rank` and `alpha`. Stride, padding and dilation are those of the adapted
layer.

The default targets are every linear map and convolution of the blocks, and the layers around the blocks of a UNet
(LyCORIS's preset "full"): projections, resamplers, the first and the last convolution, and the embedding of the
timestep. scaling="sqrt_rank" divides alpha by the square root of the rank, as `rs_lora` does.

It can be merged. Parameters: rank * (in * kernel + out) a site. With use_tucker, a convolution larger than 1x1 has
conv_rank * (in + out) + conv_rank^2 * kernel.

Start: D and M are uniform in +-1/sqrt(n), where n is the number of inputs of each of their outputs, and U is zero. For
embeddings D is zero and U ~ N(0, 1), as in LoRA. The start is an identity.

Differs from the authors' code: LyCORIS does not adapt embeddings, checks only the first dimension of a kernel, and
ignores the dilation of convolutions in `bypass_mode`. Its dropout, which acts only in `bypass_mode`, is not here.

Use it: `peftcore.apply(model, "locon")`, where LoRA on attention alone does not learn a style, since convolutions
generate textures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags

AROUND = ("*.proj_in", "*.proj_out", "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
"""Modules without a role that LyCORIS's preset "full" adapts."""


class LoConConfig(MethodConfig):
    """Options of LoCon."""

    method: Literal["locon"] = "locon"
    rank: PositiveInt = 16
    """Rank of the update of linear maps, including 1x1 convolutions."""
    alpha: PositiveFloat = 8.0
    """Numerator of the scale ``alpha / rank`` of the update of linear maps."""
    conv_rank: PositiveInt = 8
    """Rank of the update of kernels larger than 1x1."""
    conv_alpha: PositiveFloat = 1.0
    """Numerator of the scale ``conv_alpha / conv_rank`` of the update of larger kernels."""
    use_tucker: bool = False
    """Decompose updates of larger kernels into two 1x1 convolutions with a core between them, a small kernel from rank
    to rank."""
    scaling: Literal["rank", "sqrt_rank"] = "rank"
    """Denominator of the scale: the rank, or its square root."""


def _sizes(site: Site, config: LoConConfig) -> tuple[int, float, bool]:
    """Return rank and alpha of the update at a site, and True if the update has a core."""
    if math.prod(site.kernel) == 1:
        return config.rank, config.alpha, False
    return config.conv_rank, config.conv_alpha, config.use_tucker


def _uniform(*shape: int, inputs: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs)))


class LoConOperator(Operator):
    """The update of one site."""

    stackable = True
    padded, scaled = frozenset({"down", "core", "up"}), frozenset({"up"})

    def __init__(self, site: Site, config: LoConConfig) -> None:
        super().__init__(site)
        rank, alpha, tucker = _sizes(site, config)
        self.scale = alpha / (rank if config.scaling == "rank" else math.sqrt(rank))
        kernel, points = site.kernel, math.prod(site.kernel)
        narrow, inputs = ((), site.in_features) if tucker else (kernel, site.in_features * points)
        self.down = _uniform(*site.batch, rank, site.in_features, *narrow, inputs=inputs)
        self.core = _uniform(rank, rank, *kernel, inputs=rank * points) if tucker else None
        self.factors_are_parameters = not tucker
        self.up = nn.Parameter(torch.zeros(*site.batch, site.out_features, rank))
        if site.layer.one_hot:
            nn.init.zeros_(self.down)
            nn.init.normal_(self.up)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return the two factors of the update, and the scale. The core and `down` are multiplied into one factor."""
        down = self.down if self.core is None else torch.einsum("pq...,qi->pi...", self.core, self.down)
        return down, self.up, self.scale

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return self.layer.update(call, x, *self.factors())

    def merged(self, weight: Tensor) -> Tensor:
        down, up, scale = self.factors()
        return weight + scale * (up @ down.flatten(up.dim() - 1)).view(weight.shape)


class LoCon(Method):
    """Low-rank adaptation of linear maps and convolutions."""

    name = "locon"
    Config = LoConConfig
    tags = Tags(category="diffusion", paper="2309.14859", mergeable=True, low_rank=True)
    learning_rate = LearningRate(5e-4, "arXiv 2309.14859, appendix", on="Stable Diffusion 1.5")
    target = ("all-linear", "conv", "down", "mod", *AROUND)
    alternatives = ("all-layers",)

    def inject(self, model: nn.Module, config: LoConConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, LoConOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: LoConConfig) -> int:
        rank, _, tucker = _sizes(site, config)
        points, experts = math.prod(site.kernel), math.prod(site.batch)
        core = rank**2 * points if tucker else 0
        return experts * rank * (site.in_features * (1 if tucker else points) + site.out_features) + core
