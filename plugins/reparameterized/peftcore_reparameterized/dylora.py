"""DyLoRA: low-rank adaptation at every rank up to the largest.   Valipour et al. 2022, arXiv 2210.07558.

Equation:
    y = W x + b + alpha / n  B[:, :n] A[:n] x,   n = u, 2 u, ..., rank drawn evenly for each forward in training

A and B are as in LoRA. Since n is drawn in each step, the first rows learn to work without the later ones. So one
training yields an adapter of every rank, without a search for the best rank. A step trains only the last u of the n
rows, the drawn block. The rows before the block are used but keep their values, as in the authors' script. With
frozen=False all n rows are trained. In evaluation all ranks are used, or as many as a call selects:

    with peftcore.call(model, lora_rank=4): ...

``peftcore_reparameterized.dylora.make_lora(injection, 4)`` makes a LoRA of the first 4 ranks. A merge contains all
ranks, and so do files in the formats of other libraries. The scale is alpha / n in training and afterwards, as in a
LoRA of rank n with the same alpha. torch's generator draws n once for each forward of the model, and all layers use the
same n, as in a step of the authors' code. If a part of the model is called on its own, each of its layers draws n, as
in LyCORIS and in sd-scripts of kohya. Convolutions, embeddings and experts are adapted as in LoRA.

Parameters: rank * (in * kernel + out) a site, times the number of experts.

Start: As in LoRA: A uniform in +-1/sqrt(in), B at zero: the identity.

Differs from the authors' code: The authors multiply A and B by sqrt(rank / n) each, which is equivalent, and have u =
1. LyCORIS divides alpha by the number of blocks in training and by the rank afterwards. So with u above 1, the trained
update is scaled down. sd-scripts uses all ranks whatever n is, with the scale alpha / sqrt(rank n).

Use it: `peftcore.apply(model, "dylora")`, where the rank is chosen after training. If the rank is known, a LoRA of that
rank learns faster.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore import Injection, lora_of
from peftcore.author import (
    MATRICES,
    AppliedMethod,
    ForwardContext,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
    Tap,
    forward_context,
)
from peftcore.errors import ConfigError
from peftcore_reparameterized._low_rank import LowRankOperator, low_rank_count, low_rank_factors


class DyLoRAConfig(MethodConfig):
    """Options of DyLoRA."""

    method: Literal["dylora"] = "dylora"
    rank: PositiveInt = 8
    """The largest rank."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / n`` at rank n."""
    block_size: PositiveInt = 1
    """Number u of rows in a block; it divides the rank."""
    frozen: bool = True
    """Whether, in training, the rows before the drawn block are used without being trained. If False, all n rows are
    trained."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""

    @model_validator(mode="after")
    def _blocks(self) -> Self:
        if self.rank % self.block_size:
            raise ValueError(f"rank={self.rank} is not a multiple of block_size={self.block_size}; set one that is")
        return self


class DyLoRAOperator(LowRankOperator):
    """The factors of one site. At each rank n that is a multiple of the block size, the update is ``alpha / n B[:, :n]
    A[:n]``."""

    stackable = False

    def __init__(self, site: Site, config: DyLoRAConfig, drawn: Tap) -> None:
        super().__init__(site, config.dropout)
        self.rank, self.alpha, self.block_size = config.rank, config.alpha, config.block_size
        self.scale = config.alpha / config.rank
        self.A, self.B = low_rank_factors(site, config.rank)  # [*batch, rank, in, *kernel], [*batch, out, rank]
        self.frozen, self.drawn = config.frozen, drawn
        self.noise = 1.0  # set to 0 where nothing is to be drawn

    def draw(self, running: ForwardContext) -> Tensor:
        """Return the rank n for the current forward, a tensor [].

        Every operator draws, so that gradient checkpointing repeats the same number of draws. Only the draw of the
        first operator is used.
        """
        share = torch.rand((), device="cpu")
        if running.inputs:
            if self.drawn.get() is None:
                self.drawn.put(share)
            share = self.drawn.get()
        return self.block_size * (1 + (share * (self.rank // self.block_size)).floor())

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return the factors and the scale for the current forward; outside of a forward, those of the largest rank.

        Raises:
            ConfigError: a call selects a rank that does not exist.
        """
        running = forward_context()
        told = running.context.get("lora_rank")
        if told is not None:
            return self.factors_of(told, frozen=self.training and self.frozen)
        draws = self.training and self.noise and running.state is not None
        return self.masked(self.draw(running), self.frozen) if draws else (self.A, self.B, self.scale)

    def factors_of(self, rank: int, frozen: bool = False) -> tuple[Tensor, Tensor, float]:
        """Return the factors of a rank and the scale. With `frozen`, the rows before the last block of that rank are
        detached.

        Raises:
            ConfigError: the rank is not a multiple of the block size up to the full rank.
        """
        if rank not in range(self.block_size, self.rank + 1, self.block_size):
            raise ConfigError(f"rank {rank} is not one of {self.block_size}, {2 * self.block_size}, ..., {self.rank}")
        dim, below = self.layer.batch_dims, rank - self.block_size if frozen else 0
        A, B = self.A.narrow(dim, 0, rank), self.B.narrow(-1, 0, rank)
        parts = [each.split([below, rank - below], at) for each, at in ((A, dim), (B, -1))]
        A, B = (torch.cat([low.detach(), high], at) for (low, high), at in zip(parts, (dim, -1), strict=True))
        return A, B, self.alpha / rank

    def masked(self, rank: Tensor, frozen: bool) -> tuple[Tensor, Tensor, float]:
        """Return the factors and the scale for a rank given as a tensor []. Rows beyond that rank are multiplied by
        zero."""
        rank = rank.to(self.B.device)
        row = torch.arange(self.rank, device=self.B.device)
        trains = row >= rank - (self.block_size if frozen else self.rank)
        rows = trains.view(-1, *[1] * (self.A.dim() - self.layer.batch_dims - 1))
        A, B = torch.where(rows, self.A, self.A.detach()), torch.where(trains, self.B, self.B.detach())
        return A, B * ((row < rank) * (self.rank / rank)).to(B.dtype), self.scale


class DyLoRA(Method):
    """Low-rank adaptation of every rank.

    Example:
        injection = peftcore.apply(model, "dylora", rank=8)
        peftcore.call(model, lora_rank=4)  # after training; with `with`, for a while
    """

    name = "dylora"
    Config = DyLoRAConfig
    tags = Tags(
        category="reparameterized",
        paper="2210.07558",
        mergeable=True,
        low_rank=True,
        random=True,
        exact_gradient=False,
    )
    learning_rate = LearningRate(
        5e-4, "huawei-noah/Efficient-NLP@bb44348, DyLoRA/examples/NLU/roberta_base_mnli.sh", on="RoBERTa-base, MNLI"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: DyLoRAConfig, surgeon: Surgeon) -> None:
        drawn = Tap(until_backward=True)
        for site in surgeon.sites():
            surgeon.graft(site, DyLoRAOperator, config, drawn=drawn)

    @staticmethod
    def parameter_count(site: Site, config: DyLoRAConfig) -> int:
        return low_rank_count(site, config.rank)


@torch.no_grad()
def make_lora(injection: AppliedMethod, rank: int, name: str = "lora") -> Injection:
    """Return a LoRA made of the first ranks of a DyLoRA adapter. It is frozen, and it is activated instead of the
    adapter, which remains installed.

    Raises:
        ConfigError: the injection is not a dylora, or lacks an adapter of that rank.
        PeftcoreError: an error of `peftcore.lora_of`. Then nothing is changed.
    """
    found = [(each.site, each.operator) for each in injection.grafts if isinstance(each.operator, DyLoRAOperator)]
    if not found:
        raise ConfigError("make_lora(injection, rank) needs a dylora adapter")
    made = {site.path: (site, operator.factors_of(rank)) for site, operator in found}
    return lora_of(injection.model, made, name, [injection.whole.name])
