"""ARC, adapter re-composing.   Dong et al. 2023, arXiv 2310.06234 (code: DavidYanAnDe/ARC).

Equation:
    y = W x' + bias,   x' = x + D (r * D^T x) + b,   D [d, h] shared by all layers,   r [h],   b [d]
    W' = W (I + D diag(r) D^T),   bias' = bias + W b        since nothing in it is non-linear

in front of the first matrices of attention and feed-forward, after their norms: queries, keys and values share one
adapter. All attentions share one D, and all feed-forwards another. Models with several widths (Swin) have one pair of D
for each width, as in the authors' code. (In these models that code puts the feed-forward's adapter in front of the
norm.) As in `repadapter`, convolutions with padding are refused. Weights without a bias are refused if the model reads
them without calling their module. With ``target=["attn.q", "attn.k", "attn.v"]`` it is the authors' ARC_att.

Parameters: h + d per adapter, and d h once for each D: 96,432 in a ViT-B/16.

Start: D from a Xavier-uniform draw, b at zero; r of attention at zero, r of feed-forwards from a Xavier-uniform draw
too. So a fresh ARC is not an identity (``feed_forward_start="zero"`` makes it one).

Differs from the authors' code: No difference is known.

Use it: `peftcore.apply(model, "arc")`, where inference must cost nothing and files must be small; not where each layer
needs separate directions (`repadapter` shares no factor; `fact_tk` shares factors of the weights' updates).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, MethodConfig, Share, Shared, Site, Surgeon, Tags
from peftcore_vision._in_front import READERS, InFrontOperator, read_alike, refuse

FED = READERS["mlp"]
"""Roles of the first matrices of a feed-forward."""


class ARCConfig(MethodConfig):
    """Options of ARC."""

    overridable = ("feed_forward_start", "dropout")

    method: Literal["arc"] = "arc"
    bottleneck: PositiveInt = 50
    """Width h of the bottleneck, which all layers share."""
    feed_forward_start: Literal["xavier", "zero"] = "xavier"
    """The start of r in front of feed-forwards: a Xavier-uniform draw, or zero."""
    dropout: Share | None = None
    """Dropout probability of the bottleneck's activations. None: 0.1, but 0 for weights that the model reads without
    calling their module."""


class Projection(nn.Module):
    """The shared projection D, stored transposed as ``[h, d]``."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner, width))
        nn.init.xavier_uniform_(self.weight)


class ARCOperator(InFrontOperator):
    """The adapter in front of one matrix, or of several with the same input."""

    def __init__(self, site: Site, config: ARCConfig, projection: Shared) -> None:
        super().__init__(site, config.dropout, 1.0)
        self.projection = projection
        drawn = site.role in FED and config.feed_forward_start == "xavier"
        bound = math.sqrt(6 / (1 + config.bottleneck)) if drawn else 0.0
        self.rescale = nn.Parameter(torch.empty(*site.batch, config.bottleneck).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(*site.batch, site.in_features))

    def down(self) -> tuple[Tensor, None]:
        return self.rescale.unsqueeze(-1) * self.projection.module.weight, None

    def up(self, low: Tensor) -> Tensor:
        return low @ self.projection.module.weight.to(low.dtype)

    def shift(self) -> Tensor:
        return self.bias


class ARC(Method):
    """Linear adapters in front of attention and feed-forward. Layers share the projections, and the adapters can be
    merged."""

    name = "arc"
    Config = ARCConfig
    tags = Tags(
        category="vision",
        paper="2310.06234",
        mergeable=True,
        identity_at_init=False,
        identity_options={"feed_forward_start": "zero"},
        random=True,
    )
    learning_rate = LearningRate(5e-3, "DavidYanAnDe/ARC@8227d57, FGVC_ARC_train.py", on="ViT-B/16, Stanford Dogs")
    target = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")

    def inject(self, model: nn.Module, config: ARCConfig, surgeon: Surgeon) -> None:
        for first, *others in read_alike(surgeon):
            for site in (first, *others):
                refuse(site, config.at(first.path).dropout)
            family = next((name for name, roles in READERS.items() if first.role in roles), "others")
            name = f"{family.replace('.', '_')}_{first.in_features}"
            shared = surgeon.own(name, partial(Projection, config.bottleneck, first.in_features))
            surgeon.graft(first, ARCOperator, config, tuple(others), projection=shared)

    @staticmethod
    def parameter_count(site: Site, config: ARCConfig) -> int:
        return math.prod(site.batch) * (config.bottleneck + site.in_features)
