"""FacT-TT: factor tuning by a tensor train.   Jie and Deng 2022, arXiv 2212.03145 (code: JieShibo/PETL-ViT).

Equation:
    dW_t = s V Sigma_t U,   U [r, d] and V [d, r] shared by all sites,   Sigma_t [r, r] for each slice t

The weights of a model are treated as one stack of slices [d, d], where d is the hidden size. The matrices of queries,
keys, values and the attention's output are one slice each, and each matrix of a feed-forward is four, so a block of a
ViT has 12 slices. Matrices are cut into slices in both directions, and d is the greatest common divisor of all widths,
so feed-forwards of other sizes and stacks of several widths (Swin) are supported too. A convolution has separate slices
for each position of its kernel, and stacked experts have separate slices for each expert.

Parameters: r^2 per slice, and 2 d r once: 2 d r + 12 L r^2 for a ViT of L blocks.

Start: U and Sigma as linear layers, V at zero. A fresh adapter is the identity.

Differs from the authors' code: In the authors' code d = 768 and the four slices of a feed-forward's matrix are
hard-coded.

Use it: `peftcore.apply(model, "fact_tt")`, where the adapter itself must be tiny, for example with one adapter for each
of many tasks. It can be merged.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, Shared, Surgeon, Tags
from peftcore_vision._fact import FactConfig, FactOperator, FactSite, fact_sites, shared_factors


class FactTTConfig(FactConfig):
    """Options of FacT-TT."""

    method: Literal["fact_tt"] = "fact_tt"


class FactTTOperator(FactOperator):
    """The update of one site: each slice has a separate core Sigma_t."""

    def __init__(self, site: FactSite, config: FactTTConfig, U: Shared, V: Shared) -> None:
        super().__init__(site, config, U, V)
        rows, columns, places = site.cut
        self.sigma = nn.Parameter(torch.empty(*site.batch, places, rows * config.rank, columns * config.rank))
        bound = 1 / math.sqrt(places * columns * config.rank)
        nn.init.uniform_(self.sigma, -bound, bound)

    def middle(self) -> Tensor:
        return self.sigma


class FactTT(Method):
    """Low-rank updates whose outer factors all layers share."""

    name = "fact_tt"
    Config = FactTTConfig
    tags = Tags(category="vision", paper="2212.03145", mergeable=True, low_rank=True, random=True)
    learning_rate = LearningRate(1e-3, "JieShibo/PETL-ViT@026e4f1, FacT/fact_tt.py", on="ViT-B/16, VTAB-1k")
    config_version = 2
    former_defaults = ({"dropout": 0.0},)
    target = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down")

    def inject(self, model: nn.Module, config: FactTTConfig, surgeon: Surgeon) -> None:
        sites = fact_sites(surgeon, config)
        U, V = shared_factors(surgeon, sites[0].side, config.rank)
        for site in sites:
            surgeon.graft(site, FactTTOperator, config, U=U, V=V)

    @staticmethod
    def parameter_count(site: FactSite, config: FactTTConfig) -> int:
        return site.count * config.rank**2
