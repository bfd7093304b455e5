"""RepAdapter.   Luo et al. 2023, arXiv 2302.08106 (code: luogen1996/RepAdapter).

Equation:
    y = W x' + bias,   x' = x + s (G(A x + a) + b),   A [h, d],   G [d, h] of g diagonal blocks [d/g, h/g]
    W' = W (I + s G A),   bias' = bias + W s (G a + b)        since nothing in it is non-linear

in front of the first matrices of a branch. Matrices with the same input share one adapter: queries, keys and values, or
the gate of a feed-forward and the matrix parallel to it. For a convolution the adapter acts on channels, as the
authors' RepAdapter2D. Convolutions with padding are refused, since the shift b would not act on the padding. Weights
without a bias are refused if the model reads them without calling their module.

Parameters: d h + h + d h / g + d per adapter.

Start: A from a Xavier-uniform draw, all else at zero. A fresh adapter is the identity.

Differs from the authors' code: The authors' own merging fails with g = 1; no other difference is known.

Use it: `peftcore.apply(model, "repadapter")`, where inference must cost nothing.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_vision._in_front import InFrontOperator, read_alike, refuse


class RepAdapterConfig(MethodConfig):
    """Options of RepAdapter."""

    method: Literal["repadapter"] = "repadapter"
    bottleneck: PositiveInt = 8
    """Width h of the bottleneck."""
    groups: PositiveInt = 2
    """Number g of diagonal blocks of G; it must divide h and d."""
    scale: PositiveFloat = 1.0
    """The factor s in front of the adapter; the authors search it between 0.1 and 10."""
    dropout: Share | None = None
    """Dropout probability of the bottleneck's activations. None: 0.1, but 0 for weights that the model reads without
    calling their module."""


class RepAdapterOperator(InFrontOperator):
    """The adapter in front of one matrix, or of several with the same input."""

    def __init__(self, site: Site, config: RepAdapterConfig) -> None:
        super().__init__(site, config.dropout, config.scale)
        width, inner, self.groups = site.in_features, config.bottleneck, config.groups
        if width % self.groups or inner % self.groups:
            raise UnsupportedSite(
                f"{site.path}: groups={self.groups} does not divide both its {width} inputs and h = {inner}; set "
                "another groups="
            )
        self.A = nn.Parameter(torch.empty(*site.batch, inner, width))
        self.a = nn.Parameter(torch.zeros(*site.batch, inner))
        self.B = nn.Parameter(torch.zeros(*site.batch, width, inner // self.groups))  # the blocks, one below the other
        self.b = nn.Parameter(torch.zeros(*site.batch, width))
        nn.init.uniform_(self.A, -math.sqrt(6 / (width + inner)), math.sqrt(6 / (width + inner)))

    def down(self) -> tuple[Tensor, Tensor]:
        return self.A, self.a

    def up(self, low: Tensor) -> Tensor:
        blocks = self.B.to(low.dtype).unflatten(-2, (self.groups, -1))  # [*batch, g, d/g, h/g]
        if self.layer.batch_dims:
            blocks = blocks.unsqueeze(-4)  # numbers of an expert lie in rows
        return torch.einsum("...gi,...goi->...go", low.unflatten(-1, (self.groups, -1)), blocks).flatten(-2)

    def shift(self) -> Tensor:
        return self.b


class RepAdapter(Method):
    """Linear adapters in front of attention and feed-forward, which can be merged into the first matrices of attention
    and feed-forward."""

    name = "repadapter"
    Config = RepAdapterConfig
    tags = Tags(category="vision", paper="2302.08106", mergeable=True, random=True)
    learning_rate = LearningRate(1e-3, "luogen1996/RepAdapter@360992f, train.py", on="ViT-B/16, VTAB-1k")
    config_version = 2
    former_defaults = ({"dropout": 0.0},)
    target = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")

    def inject(self, model: nn.Module, config: RepAdapterConfig, surgeon: Surgeon) -> None:
        for first, *others in read_alike(surgeon):
            for site in (first, *others):
                refuse(site, config.at(first.path).dropout)
            surgeon.graft(first, RepAdapterOperator, config, tuple(others))

    @staticmethod
    def parameter_count(site: Site, config: RepAdapterConfig) -> int:
        width, inner = site.in_features, config.bottleneck
        return math.prod(site.batch) * (width * inner + inner + width * inner // config.groups + width)
