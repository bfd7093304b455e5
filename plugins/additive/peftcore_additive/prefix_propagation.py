"""Prefix-propagation.   Li et al. 2023, arXiv 2305.12086 (code: MonliH/prefix-propagation).

Equation:
    [R ; X]  ->  block l of [R + P_l ; X],   P_l [length, d] for every block l

Rows R are put in front of the tokens and pass through the whole stack, also as queries: each block adds its P_l to the
rows that the previous block returned. (The keys and values of prefix tuning do not depend on previous blocks.) R is the
output of the stack's embedding module for zero vectors, so it contains positions, token types and a norm if the stack
has them.

P trains directly, or a network generates it, P_l = W_l tanh(W Z + b) + b_l, with Z [length, d] and W [projection, d].
Dropout acts on P in training, as on hidden states.

Rows count as words, so the positions of tokens follow the positions of the rows. If attention has windows, all tokens
attend to the rows only if a ``global_attention_mask`` is passed; Longformer's classifiers pass it automatically.

Parameters: length * d a block. With `projection`, (projection + 1) d a block, and (length + projection) d + projection
once.

Start: P from N(0, 0.02), or Z and W from N(0, 0.02) and b at zero. No start is an identity.

Differs from the authors' code: In the authors' Longformer and RoBERTa, rows have positions from 0 on, which both models
never use for tokens. Here rows have the positions in front of the first token. In the authors' BigBird, rows do not
have positions. Heads read the same tokens as without rows, as in the authors' BigBird and RoBERTa. The authors'
Longformer classifies by the first row unless --use_offset_pool_tok is set. It also trains its token types; use
``train=["token_type_embeddings"]`` for that.

Use it: `peftcore.apply(model, "prefix_propagation")`, for long texts, with half the parameters of `prefix_tuning`. It
cannot route rows of one batch to different adapters; `prefix_tuning` can.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    InnerRows,
    InnerSite,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
    full_precision,
)
from peftcore.errors import UnsupportedSite


class PrefixPropagationConfig(MethodConfig):
    """Options of prefix-propagation."""

    method: Literal["prefix_propagation"] = "prefix_propagation"
    length: PositiveInt = 8
    """Number of rows in front of the tokens; the authors use 32 for questions about several documents."""
    projection: PositiveInt | None = None
    """Width of the network that generates the vectors P, 512 in the authors' code; None trains the vectors directly."""
    dropout: Share = 0.1
    """Dropout probability of the entries of the vectors P in training."""


class PropagationOperator(InnerRows):
    """The rows of one encoder or decoder, and the vectors P_l that are added to the rows at each block."""

    def __init__(self, site: InnerSite, config: PrefixPropagationConfig) -> None:
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
        """Return the vectors that are added to the rows at a block, ``[length, width]``."""
        if self.projection is None:
            return self.prefix[depth]
        with full_precision(like):
            hidden = self.down(self.start).tanh()
            mine = slice(depth * self.width, (depth + 1) * self.width)
            return nn.functional.linear(hidden, self.up.weight[mine], self.up.bias[mine])


class PrefixPropagation(Method):
    """Puts rows in front of the tokens that pass through all blocks. Before each block, trained vectors are added to
    the rows."""

    name = "prefix_propagation"
    Config = PrefixPropagationConfig
    tags = Tags(category="additive", paper="2305.12086", identity_at_init=False, per_row=False, random=True)
    learning_rate = LearningRate(
        7e-3,
        "MonliH/prefix-propagation@fc868c5, run_script/hyperpartisan_longformer_propagation.sh",
        on="Longformer-base, Hyperpartisan, the first of six",
    )
    target = "stack"

    def inject(self, model: nn.Module, config: PrefixPropagationConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            blocks = range(surgeon.blocks_of(site))
            if not blocks:
                raise UnsupportedSite(
                    f"{site.path}: the blocks of this stack are unknown, so prefixes cannot be added to their rows; "
                    "use prefix_tuning or prompt_tuning"
                )
            surgeon.sequence(site, PropagationOperator, config, blocks=blocks, counted=True)

    @staticmethod
    def parameter_count(site: Site, config: PrefixPropagationConfig) -> int:
        if not isinstance(site, InnerSite):
            return 0
        d, blocks = site.out_features, len(site.depths)
        if config.projection is None:
            return blocks * config.length * d
        return config.length * d + (d + 1) * config.projection + (config.projection + 1) * blocks * d
