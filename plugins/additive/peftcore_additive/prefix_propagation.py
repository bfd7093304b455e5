"""Prefix-propagation.   Li et al. 2023, arXiv 2305.12086 (code: MonliH/prefix-propagation).

    [R ; X]  ->  block l of [R + P_l ; X],   P_l [length, d] for every block l

Rows R stand in front of the tokens and go through the whole stack, as queries too: what a block made of them is what
the next one adds its P_l to. (The keys and values of prefix tuning know nothing of the blocks below.) They begin as
what the stack's embeddings make of zeros: a position, a token type and a norm where it has them.

P trains directly, from N(0, 0.02), or is made by a network, P_l = W_l tanh(W Z + b) + b_l, with Z [length, d] and W
[projection, d], all N(0, 0.02) and b zero. In training its numbers are dropped out, as those of hidden states are.

Rows count as words: tokens have the positions behind them. So it is in the authors' Longformer and RoBERTa, whose rows
take positions from 0 on, which no word has there; here they have those in front of the first token. (In their BigBird
rows have none.) Where attention has windows, rows are seen from everywhere if ``global_attention_mask`` is given, which
Longformer's classifiers do by themselves. Heads read the tokens that they read without rows, as in the authors' BigBird
and RoBERTa; their Longformer classifies by the first row unless it is told --use_offset_pool_tok. That one trains its
token types along, here ``train=["token_type_embeddings"]``.

Never identity. Parameters: length * d a block; with projection (length + projection) d + projection + (projection + 1)
d a block.

Use it where texts are long, for half of prefix_tuning's parameters; not for many users' rows in one batch, which
prefix_tuning can have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    InnerRows,
    InnerSite,
    LearningRate,
    Method,
    MethodConfig,
    Site,
    Surgeon,
    Tags,
    full_precision,
)
from peftcore.errors import UnsupportedSite


class Config(MethodConfig):
    """Options of prefix-propagation."""

    method: Literal["prefix_propagation"] = "prefix_propagation"
    length: PositiveInt = 8
    """Rows in front of the tokens; the authors take 32 for questions about several documents."""
    projection: PositiveInt | None = None
    """Width of the network that makes what is added to them (512 in the authors' code); None trains it itself."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Probability with which numbers of it are dropped in training."""


class PropagationOperator(InnerRows):
    """The additions to the rows at the blocks of one stack."""

    def __init__(self, site: InnerSite, config: Config) -> None:
        super().__init__(site, config.length)
        blocks, width = len(site.depths), self.width
        self.projection, self.dropout = config.projection, nn.Dropout(config.dropout)
        if config.projection is None:
            self.prefix = nn.Parameter(torch.randn(blocks, config.length, width) * 0.02)
            return
        self.start = nn.Parameter(torch.randn(config.length, width) * 0.02)
        self.down, self.up = nn.Linear(width, config.projection), nn.Linear(config.projection, blocks * width)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def rows_at(self, depth: int, states: Tensor, rows: Tensor, given: Mapping[str, Any]) -> Tensor:
        (added,) = self.cast(rows, self.dropout(self.added_at(depth, rows)))
        return rows + added

    def added_at(self, depth: int, like: Tensor) -> Tensor:
        """Return what is added to the rows at a block, ``[length, width]``."""
        if self.projection is None:
            return self.prefix[depth]
        with full_precision(like):
            hidden = self.down(self.start).tanh()
            mine = slice(depth * self.width, (depth + 1) * self.width)
            return nn.functional.linear(hidden, self.up.weight[mine], self.up.bias[mine])


class PrefixPropagation(Method):
    """Rows in front of the tokens that go through all blocks, to which something trained is added at each."""

    name = "prefix_propagation"
    Config = Config
    tags = Tags(category="additive", paper="2305.12086", identity_at_init=False, per_row=False, random=True)
    learning_rate = LearningRate(
        7e-3,
        "MonliH/prefix-propagation@fc868c5, run_script/hyperpartisan_longformer_propagation.sh",
        on="Longformer-base, Hyperpartisan, the first of six",
    )
    target = "stack"

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            blocks = range(surgeon.blocks_of(site))
            if not blocks:
                raise UnsupportedSite(f"{site.path}: no blocks are known there at which to add to rows")
            surgeon.sequence(site, PropagationOperator, config, blocks=blocks, counted=True)

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        if not isinstance(site, InnerSite):
            return 0
        d, blocks = site.out_features, len(site.depths)
        if config.projection is None:
            return blocks * config.length * d
        return config.length * d + (d + 1) * config.projection + (config.projection + 1) * blocks * d
