"""DyLoRA: low-rank adaptation at every rank up to the largest.   Valipour et al. 2022, arXiv 2210.07558.

    y = W x + b + alpha / n  B[:, :n] A[:n] x,   n = u, 2 u, ..., rank drawn evenly for each forward in training

A and B are as in LoRA. Since n is drawn in each step, lower rows learn to work without the rows above: one training
gives an adapter of each rank, without a search for the rank. Only the last u of the n rows, the drawn block, are
trained; the rows below the block act and keep their values, as in the authors' script. With `frozen` off all n are
trained. In evaluation all ranks act, or as many as a call selects:

    with peftcore.call(model, lora_rank=4): ...

and ``peftcore_reparameterized.dylora.make_lora(injection, 4)`` cuts a LoRA of that rank off. A merge and files of
other programs have all ranks. The scale is alpha / n in training and afterwards, so a LoRA of rank n and that alpha.
The authors multiply A and B by sqrt(rank / n) each, which is the same; they have u = 1. n is drawn once for a forward
of the model, by torch's generator, and holds in all layers, as theirs does for a step; where a part of the model runs
by itself each layer draws, as in LyCORIS and kohya's sd-scripts. LyCORIS divides alpha by the number of blocks in
training and by the rank afterwards, so that with u above 1 what was trained is scaled down; sd-scripts has all ranks
act whatever is drawn, with the scale alpha / sqrt(rank n). Convolutions, embeddings and experts as in LoRA.

Parameters: rank * (in * kernel + out) a site, times the number of experts.

Use it where the rank is to be chosen after training; not where it is known, as LoRA of that rank learns faster.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
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
from peftcore_reparameterized._low_rank import low_rank_count
from peftcore_reparameterized._nested import NestedOperator, make_lora

__all__ = ["DyLoRA", "DyLoRAConfig", "DyLoRAOperator", "make_lora"]


class DyLoRAConfig(MethodConfig):
    """Options of DyLoRA."""

    method: Literal["dylora"] = "dylora"
    rank: PositiveInt = 8
    """The largest rank."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / n`` at rank n."""
    block_size: PositiveInt = 1
    """Rows u by which ranks differ; it divides the rank."""
    frozen: bool = True
    """In training, rows below the drawn block act without being trained; if off, all n rows are trained."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""

    @model_validator(mode="after")
    def _blocks(self) -> Self:
        if self.rank % self.block_size:
            raise ValueError(f"rank={self.rank} is no multiple of block_size={self.block_size}: take one that is")
        return self


class DyLoRAOperator(NestedOperator):
    """The factors of one site, of which the first ranks act."""

    def __init__(self, site: Site, config: DyLoRAConfig, drawn: Tap) -> None:
        super().__init__(site, config.rank, config.alpha, config.block_size, config.dropout)
        self.frozen, self.drawn = config.frozen, drawn
        self.noise = 1.0  # set to 0 where nothing is to be drawn

    def draw(self, running: ForwardContext) -> Tensor:
        """Return the rank that was drawn for the forward that runs, [].

        Every operator draws, so that a block that runs again draws as often, and the first one's share counts.
        """
        share = torch.rand((), device="cpu")
        if running.inputs:
            if self.drawn.get() is None:
                self.drawn.put(share)
            share = self.drawn.get()
        return self.block_size * (1 + (share * (self.rank // self.block_size)).floor())

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return the factors that act in the forward that runs; outside of any, those of the largest rank.

        Raises:
            ConfigError: a call selects a rank that does not exist.
        """
        running = forward_context()
        told = running.context.get("lora_rank")
        if told is not None:
            return self.factors_of(told, frozen=self.training and self.frozen)
        draws = self.training and self.noise and running.state is not None
        return self.masked(self.draw(running), self.frozen) if draws else (self.A, self.B, self.scale)


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
