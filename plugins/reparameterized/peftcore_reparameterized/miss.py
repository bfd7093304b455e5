"""MiSS: matrix shard sharing.   Kang and Yin 2024, arXiv 2409.15371 (in peft by its authors; once called Bone).

Equation:
    W'[:, j] = W[:, j] + D[j mod rank],   D [rank, out]

Every `rank` columns of the weight share their update, so y = W x + b + D' z, where z sums the inputs in shards of
`rank`: z[k] = x[k] + x[rank + k] + x[2 rank + k] + … The last shard may be shorter; then x is padded with zeros. The
update is low-rank, and its first factor is fixed, so it has half of the parameters of a LoRA. It is not scaled.

With `outputs` ("mini" in peft), D has only that many columns, and repeats them. `outputs` must divide the number of the
weight's outputs. With `bat` ("bat" in peft), the update also depends on the weight. The weight is split into blocks
W[i, j] of the shape [rank, rank], and D contains one block for each i: W'[i, j] = W[i, j] + W[i, j] D[i] + D[i]. This
update does not have low rank and does not support dropout. The rank must divide inputs and outputs.

Kernels of convolutions are shared as columns of [out, in * kernel], and embeddings as [dim, num]: tokens `rank` apart
share their update. Each expert has a separate D.

Parameters: rank * out a site, with `outputs` rank * outputs, times the number of experts; rank at most in * kernel.

Start: D at zero: the identity.

Differs from the authors' code: The code in peft, which is by the authors, supports linear layers only.

Use it: `peftcore.apply(model, "miss")`, instead of LoRA to halve the number of parameters at the same rank. Only one
factor has to be initialized and tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags, WeightOperator
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._low_rank import LowRankOperator


class MiSSConfig(MethodConfig):
    """Options of MiSS."""

    method: Literal["miss"] = "miss"
    rank: PositiveInt = 64
    """Number of columns of a shard, each with a separate update; at most the number of the weight's columns."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    outputs: PositiveInt | None = None
    """Number of outputs with separate updates, which the other outputs repeat. With None, all outputs have separate
    updates."""
    bat: bool = False
    """Use Bat: the change of a block also depends on the block's weight."""

    @model_validator(mode="after")
    def _check_form(self) -> MiSSConfig:
        if self.bat and (self.dropout or self.outputs):
            raise ValueError("bat does not work with dropout and outputs: remove them")
        return self


def shard(site: Site, config: MiSSConfig) -> int:
    """Return the number of columns of one shard."""
    return min(config.rank, site.in_features * math.prod(site.kernel))


def own_outputs(site: Site, config: MiSSConfig) -> int:
    """Return the number of outputs with separate updates.

    Raises:
        UnsupportedSite: this number does not divide the number of all outputs.
    """
    if config.outputs is None:
        return site.out_features
    if site.out_features % config.outputs:
        raise UnsupportedSite(
            f"{site.path} has {site.out_features} outputs, which are not a multiple of outputs={config.outputs}; set "
            "another number for it with overrides=, or exclude the site"
        )
    return config.outputs


class MiSSOperator(LowRankOperator):
    """The update that the shards of one weight share."""

    def __init__(self, site: Site, config: MiSSConfig) -> None:
        super().__init__(site, config.dropout)
        self.inputs = (site.in_features, *site.kernel)
        self.times = site.out_features // own_outputs(site, config)
        self.D = nn.Parameter(torch.zeros(*site.batch, shard(site, config), own_outputs(site, config)))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return the factors. The first one sums the shards, and consists of zeros and ones. It is not stored, because
        it is as large as that of a LoRA."""
        rank, device = self.D.shape[-2], self.D.device
        rows = torch.arange(math.prod(self.inputs), device=device) % rank == torch.arange(rank, device=device)[:, None]
        A = rows.to(self.D.dtype).view(rank, *self.inputs)
        return A.expand(*self.D.shape[:-2], *A.shape), self.repeated(), 1.0

    def repeated(self) -> Tensor:
        """Return D repeated over the outputs, [*batch, out, rank]."""
        own = self.D.mT
        return own if self.times == 1 else own.repeat(*[1] * (own.dim() - 2), self.times, 1)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not self.layer.of_vectors:
            return super().forward(call, x)
        rank, y = self.D.shape[-2], call(x)
        kept = F.dropout(x, self.input_dropout, self.training) if self.input_dropout else x
        z = F.pad(kept, (0, -x.shape[-1] % rank)).unflatten(-1, (-1, rank)).sum(-2)
        z, D = self.cast(y, z, self.repeated())
        return self.layer.add(y, z, D, 1.0)


class BatOperator(WeightOperator):
    """The update of one weight in blocks, which depends on the trained D and on the blocks themselves."""

    def __init__(self, site: Site, config: MiSSConfig) -> None:
        super().__init__(site)
        rank, columns = config.rank, site.in_features * math.prod(site.kernel)
        if site.out_features % rank or columns % rank:
            raise UnsupportedSite(
                f"{site.path} is {site.out_features} x {columns}, which blocks of rank={rank} do not divide; set "
                "another rank for it with overrides=, or exclude the site"
            )
        self.D = nn.Parameter(torch.zeros(*site.batch, site.out_features // rank, rank, rank))

    def forward(self, weight: Tensor) -> Tensor:
        rank, D = self.D.shape[-1], self.D
        rows = weight.reshape(*D.shape[:-2], -1, rank)  # [*batch, i, row and j, :]: one D for all of them
        changed = (rows @ D).unflatten(-2, (rank, -1)) + D.unsqueeze(-2)
        return weight + changed.view(weight.shape)


class MiSS(Method):
    """Matrix shard sharing."""

    name = "miss"
    Config = MiSSConfig
    tags = Tags(category="reparameterized", paper="2409.15371", mergeable=True, low_rank=True)
    learning_rate = LearningRate(2e-5, "JL-er/MiSS@a17e631, scripts/math/run_miss.sh", on="Qwen3-4B, MetaMathQA")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: MiSSConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, BatOperator if config.at(site.path).bat else MiSSOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: MiSSConfig) -> int:
        columns = site.out_features if config.bat else own_outputs(site, config)
        return math.prod(site.batch) * shard(site, config) * columns
