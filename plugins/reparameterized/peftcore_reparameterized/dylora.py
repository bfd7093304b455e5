"""DyLoRA: low-rank adaptation at every rank up to the largest.   Valipour et al. 2022, arXiv 2210.07558.

    y = W x + b + alpha / n  B[:, :n] A[:n] x,   n = u, 2 u, ..., rank drawn evenly for each forward in training

A and B as in LoRA. What stands below rank n is worth more than what stands above, as n is drawn: so one training gives
an adapter of each rank, and nobody has to search for one. Of the block of u rows that is drawn, the last of the n,
values are trained; rows below it act and stay as they are, as in the authors' script. With `frozen` off all n are
trained. Out of training all ranks act, or as many as a call says:

    with peftcore.call(model, lora_rank=4): ...

and ``peftcore_reparameterized.dylora.make_lora(injection, 4)`` cuts a LoRA of that rank off. A merge and files of
other programs have all ranks. The scale is alpha / n in training and afterwards, so a LoRA of rank n and that alpha.
The authors multiply A and B by sqrt(rank / n) each, which is the same; they have u = 1. n is drawn once for a forward,
as theirs is once for a step, so that all layers, and what backward computes again, agree. LyCORIS and kohya's
sd-scripts draw in each layer by itself. LyCORIS divides alpha by the number of blocks in training and by the rank
afterwards, so that with u above 1 what was trained is scaled down; sd-scripts has all ranks act whatever is drawn, with
the scale alpha / sqrt(rank n). Convolutions, embeddings and experts as in LoRA.

Parameters: rank * (in * kernel + out) a site, times the number of experts.

Use it where the rank is to be chosen after training; not where it is known, as LoRA of that rank learns faster.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore import (
    MATRICES,
    AppliedMethod,
    Draws,
    Injection,
    LearningRate,
    Method,
    MethodConfig,
    Shared,
    Site,
    Surgeon,
    Tags,
    forward_context,
    lora_of,
)
from peftcore.errors import ConfigError
from peftcore_reparameterized._low_rank import LowRankOperator, low_rank_count, low_rank_factors


class Config(MethodConfig):
    """Options of DyLoRA."""

    method: Literal["dylora"] = "dylora"
    rank: PositiveInt = 8
    """The largest rank."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / n`` at rank n."""
    block_size: PositiveInt = 1
    """Rows u by which ranks differ; it divides the rank."""
    frozen: bool = True
    """In training, let what stands below the block that is drawn act and stay as it is."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability with which inputs of the update are dropped in training."""

    @model_validator(mode="after")
    def _blocks(self) -> Self:
        if self.rank % self.block_size:
            raise ValueError(f"rank={self.rank} is no multiple of block_size={self.block_size}: take one that is")
        return self


class DyLoRAOperator(LowRankOperator):
    """The factors of one site, of which the first ranks act."""

    stackable = False

    def __init__(self, site: Site, config: Config, draws: Shared) -> None:
        super().__init__(site, config.dropout)
        self.alpha, self.rank, self.block_size = config.alpha, config.rank, config.block_size
        self.frozen, self.draws = config.frozen, draws
        self.A, self.B = low_rank_factors(site, config.rank)  # [*batch, rank, in, *kernel], [*batch, out, rank]

    def acting(self) -> int:
        """Return the rank that acts in the forward that runs; outside of any, the largest.

        Raises:
            ConfigError: a call says a rank that there is not.
            TrainingError: a part of the host trains by itself.
        """
        running = forward_context()
        told = running.context.get("lora_rank")
        if told is not None:
            self.check(told)
            return int(told)
        if not self.training or running.state is None:
            return self.rank
        drawn, blocks = self.draws.module(running), self.rank // self.block_size
        return self.block_size * (1 + drawn * blocks // (self.draws.module.most + 1))

    def check(self, rank: int) -> None:
        """Check that there is an adapter of that rank.

        Raises:
            ConfigError: there is none.
        """
        if rank not in range(self.block_size, self.rank + 1, self.block_size):
            raise ConfigError(f"rank {rank} is none of {self.block_size}, {2 * self.block_size}, ..., {self.rank}")

    def factors_of(self, rank: int, below: int = 0) -> tuple[Tensor, Tensor, float]:
        """Return the factors of that rank and the scale; the first rows, so many as are `below`, are constants."""
        dim, sizes = self.layer.batch_dims, [below, rank - below]
        rows, columns = self.A.narrow(dim, 0, rank).split(sizes, dim), self.B.narrow(-1, 0, rank).split(sizes, -1)
        A, B = torch.cat([rows[0].detach(), rows[1]], dim), torch.cat([columns[0].detach(), columns[1]], -1)
        return A, B, self.alpha / rank

    def factors(self) -> tuple[Tensor, Tensor, float]:
        rank = self.acting()
        return self.factors_of(rank, rank - self.block_size if self.training and self.frozen else 0)


class DyLoRA(Method):
    """Low-rank adaptation of every rank.

    Example:
        injection = peftcore.apply(model, "dylora", rank=8)
        peftcore.call(model, lora_rank=4)  # after training; with `with`, for a while
    """

    name = "dylora"
    Config = Config
    tags = Tags(category="reparameterized", paper="2210.07558", mergeable=True, low_rank=True, exact_gradient=False)
    learning_rate = LearningRate(
        5e-4, "huawei-noah/Efficient-NLP@bb44348, DyLoRA/examples/NLU/roberta_base_mnli.sh", on="RoBERTa-base, MNLI"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        most = max((own.rank // own.block_size for own in (config.at(site.path) for site in sites)), default=1)
        draws = surgeon.own("draws", lambda: Draws(most - 1))
        for site in sites:
            surgeon.graft(site, partial(DyLoRAOperator, draws=draws), config)

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        return low_rank_count(site, config.rank)


@torch.no_grad()
def make_lora(injection: AppliedMethod, rank: int, name: str = "lora") -> Injection:
    """Return the LoRA of the first ranks: frozen, and active in place of the adapter, which stays.

    Raises:
        ConfigError: it is no dylora, or has none of that rank.
        PeftcoreError: as `peftcore.lora_of` does; nothing was changed.
    """
    found = [graft for graft in injection.grafts if isinstance(graft.operator, DyLoRAOperator)]
    if not found:
        raise ConfigError("make_lora(injection, rank) is for a dylora")
    made = {}
    for graft in found:
        graft.operator.check(rank)
        made[graft.site.path] = graft.site, graft.operator.factors_of(rank)
    return lora_of(injection.model, made, name, [injection.whole.name])
