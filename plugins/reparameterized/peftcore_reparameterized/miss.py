"""MiSS: matrix shard sharing.   Kang and Yin 2024, arXiv 2409.15371 (in peft by its authors; once called Bone).

    W'[:, j] = W[:, j] + D[j mod rank],   D [rank, out] zero

Every `rank` columns of the weight share their update, so y = W x + b + D' z, where z sums the inputs in shards of
`rank`: z[k] = x[k] + x[rank + k] + x[2 rank + k] + … A last shard may be shorter, as if x went on with zeros. It is a
low-rank update whose first factor is known, so it is as cheap as half a LoRA, and has no scale.

Kernels of convolutions are shared as columns of [out, in * kernel], and embeddings as [dim, num]: tokens `rank` apart
share their update. Experts have D of their own. peft has linear layers alone; its "bat" and "mini" are other equations.

Parameters: rank * out a site, times the number of experts; rank at most in * kernel.

Use it in place of LoRA for half the parameters at the same rank, and with one factor less to start and to tune.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftcore import Method, MethodConfig, Site, Surgeon, Tags
from peftcore_reparameterized._low_rank import LowRankOperator


class Config(MethodConfig):
    """Options of MiSS."""

    method: Literal["miss"] = "miss"
    rank: PositiveInt = 64
    """Columns of a shard, each with an update of its own; at most those that there are."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability with which inputs of the update are dropped in training."""


def shard(site: Site, config: Config) -> int:
    """Columns of one shard."""
    return min(config.rank, site.in_features * math.prod(site.kernel))


class MiSSOperator(LowRankOperator):
    """The update that the shards of one weight share."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site, config.dropout)
        self.inputs = (site.in_features, *site.kernel)
        self.D = nn.Parameter(torch.zeros(*site.batch, shard(site, config), site.out_features))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """The first one sums: 1 where the column belongs to the row, made anew since it would be as large as LoRA's."""
        rank, device = self.D.shape[-2], self.D.device
        rows = torch.arange(math.prod(self.inputs), device=device) % rank == torch.arange(rank, device=device)[:, None]
        A = rows.to(self.D.dtype).view(rank, *self.inputs)
        return A.expand(*self.D.shape[:-2], *A.shape), self.D.mT, 1.0


class MiSS(Method):
    """Matrix shard sharing."""

    name = "miss"
    Config = Config
    tags = Tags(
        category="reparameterized", paper="2409.15371", mergeable=True, low_rank=True, checked_against="peft 0.21"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, MiSSOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        return math.prod(site.batch) * shard(site, config) * site.out_features
