"""LoRand, low-rank adapters of several branches.   Yin et al. 2023, CVPR, "1% vs 100%" (code: DongshuoYin/CoLin).

Equation:
    y = h + W_up gelu(W_down h + b_down) + b_up,   W_down = sum_i P_i K_i Q_i,   W_up = sum_i P_i K_i Q_i

h is the output of attention or feed-forward before it is added to the residual stream. W_down [d/2, d] and W_up [d,
d/2] are wide, but each is a sum of β products of thin factors, P_i [out, α], K_i [α, α] and Q_i [α, in]; both matrices
have separate factors.

Parameters: 2 β (α (d + d/2) + α^2) + d + d/2 per adapter, two per block.

Start: Kaiming-uniform draws, biases as torch's layers: a fresh adapter is not an identity (`zero_up` makes it one).

Differs from the authors' code: In the paper both matrices share K_i; in the authors' code (in the repository of their
later method) and here they do not.

Use it: `peftcore.apply(model, "lorand")`, for dense predictions with a Swin, with fewer parameters than a bottleneck
adapter of this width; not where inference must cost nothing: it cannot be merged. `compacter` is a similar method with
Kronecker products, and `mona` is the authors' next adapter.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.author import OUTPUTS, AtBranchEnd, BranchSite, Joins, Method, MethodConfig, Surgeon, Tags, branch_end


class LoRandConfig(MethodConfig):
    """Options of LoRand."""

    method: Literal["lorand"] = "lorand"
    rank: PositiveInt = 8
    """Rank α of a branch."""
    branches: PositiveInt = 4
    """Number β of products in the sum for a matrix."""
    reduction: PositiveInt = 2
    """Divisor of the hidden size d; the quotient is the adapter's inner width."""
    joins: Joins = "stream"
    """Where the adapter reads and adds. "stream": after the host's dropout, layer scale and stochastic depth on a
    branch's output. "matrix": before these operations, at the output of the branch's last matrix."""
    zero_up: bool = False
    """Start the outer factors of W_up and its bias at zero: an exact identity."""


class Branches(nn.Module):
    """A linear map whose matrix is a sum of β low-rank products."""

    def __init__(self, inputs: int, outputs: int, config: LoRandConfig, zero: bool = False) -> None:
        super().__init__()
        count, rank = config.branches, config.rank
        self.P = nn.Parameter(torch.empty(count, outputs, rank))
        self.K = nn.Parameter(torch.empty(count, rank, rank))
        self.Q = nn.Parameter(torch.empty(count, rank, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        # Kaiming's bound 1 / sqrt(columns) for factors that the authors keep the other way round
        for factor in (self.P, self.K, self.Q):
            bound = 1 / math.sqrt(factor.shape[1])
            nn.init.uniform_(factor, -bound, bound)
        nn.init.uniform_(self.bias, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
        if zero:
            nn.init.zeros_(self.P)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., inputs]`` to ``[..., outputs]``."""
        low = torch.einsum("...i,bri->...br", x, self.Q.to(x.dtype))
        mixed = torch.einsum("...br,bsr->...bs", low, self.K.to(x.dtype))
        out = torch.einsum("...bs,bos->...o", mixed, self.P.to(x.dtype))
        return out + self.bias.to(out.dtype)


class LoRandOperator(AtBranchEnd):
    """The adapter on the output of one branch."""

    stackable = True

    def __init__(self, site: BranchSite, config: LoRandConfig) -> None:
        super().__init__(site)
        width, inner = site.out_features, max(site.out_features // config.reduction, 1)
        self.down = Branches(width, inner, config)
        self.up = Branches(inner, width, config, config.zero_up)

    def adapt(self, h: Tensor) -> Tensor:
        added = self.up(F.gelu(self.down(self.layer.channels_last(h))))
        return h + self.layer.channels_back(added).to(h.dtype)


class LoRand(Method):
    """Bottleneck adapters after attention and feed-forward, whose matrices are sums of low-rank products."""

    name = "lorand"
    Config = LoRandConfig
    tags = Tags(
        category="vision",
        paper="CVPR 2023",
        identity_at_init=False,
        identity_options={"zero_up": True},
    )
    target = ("attn.output", "mlp.output")
    alternatives = OUTPUTS

    def inject(self, model: nn.Module, config: LoRandConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            place = branch_end(surgeon, site, config.at(site.path).joins)
            surgeon.graft(place, LoRandOperator, config, place.places)

    @staticmethod
    def parameter_count(site: BranchSite, config: LoRandConfig) -> int:
        d, r = site.out_features, config.rank
        inner = max(d // config.reduction, 1)
        return 2 * config.branches * (r * (d + inner) + r * r) + d + inner
