"""LST, ladder side-tuning.   Sung et al. 2022, arXiv 2206.06522 (code: ylsung/Ladder-Side-Tuning).

Two parts of the paper are not here: a ladder in the encoder of an encoder-decoder model (here only its decoder has
one), and the start of side blocks from rows of the model that pruning finds important.

Equation:
    z_0 = W_0 b_0,   z_l = S_l(mu_l z_{l-1} + (1 - mu_l) W_l b_l),   mu_l = sigmoid(alpha_l / T)
    y   = W_out LN(z_L)   in the place of b_L

b_0 is the input of the first block, b_l the output of block l. No gradient reaches the backbone, so its activations are
not stored for backward. S_l are pre-norm transformer blocks (attention, then a feed-forward four times as wide) of
width d / R, causal if the backbone is causal; W_l [d/R, d] has a bias.

In an encoder-decoder model the side blocks read the encoder's output only through b_l. The model's cache stores the
keys and values of the side blocks too. Other adapters inside the blocks get no gradient.

Parameters, with w = d / R and L blocks: (L + 1)(d w + w) + L (12 w^2 + 13 w + 1) + 2 w + w d + d.

Start: alpha_l starts at 0, all other parameters as torch's layers do. The model predicts only from the side network, so
no start is an identity.

Differs from the authors' code: The two parts above are missing. The authors insert y after the model's last norm, while
here this norm acts on y.

Use it: `peftcore.apply(model, "lst")`, where memory is limited: backward runs only through the small network. It cannot
be merged.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    BlockSite,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
    Tap,
    TokenStacks,
    VisibleTokens,
    cached_tokens,
)
from peftcore_additive._side import SideBlock, held_by, side_layers
from peftcore_additive._side_networks import BesideOperator, beside


class LSTConfig(MethodConfig):
    """Options of ladder side-tuning."""

    overridable = ()

    method: Literal["lst"] = "lst"
    reduction: PositiveInt = 8
    """R, the width of the model divided by the width of the side network."""
    heads: PositiveInt = 4
    """Number of heads of the side network's attention; if it does not divide the side network's width, their greatest
    common divisor is used."""
    temperature: PositiveFloat = 0.1
    """Temperature T of the gates: with smaller values gates open or close faster."""
    dropout: Share = 0.0
    """Probability with which a side block's output is dropped in training."""

    def width(self, width: int) -> int:
        """Return the width w of the side network for a stream of this width."""
        return max(1, width // self.reduction)

    def block(self, width: int) -> SideBlock:
        """Make one block of the side network."""
        return SideBlock(width, self.width(width), self.heads, self.temperature, self.dropout)


@dataclass(frozen=True)
class Ladder:
    """The side network of one stack of blocks. The injection owns its parameters."""

    down: Shared
    blocks: list[Shared]
    up: Shared
    below: int
    """The number of blocks of the host's stack."""
    stamp: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)

    def climb(self, states: Sequence[Tensor], visible: Tensor, caches: Sequence[Any]) -> Tensor:
        """Return the replacement of the last state, given the states ``[batch, tokens, d]`` before the first block and
        after each block."""
        z = self.down.module(states[0])
        for block, state, cache in zip(self.blocks, states[1:], caches or [None] * len(self.blocks), strict=True):
            z = block.module(z, state, visible, cache)
        y: Tensor = self.up.module(z)
        return y


class LadderOperator(BesideOperator):
    """Stores the state of a block; at the last block, returns the output of the side network."""

    def __init__(self, site: BlockSite, taps: Sequence[Tap], visible: VisibleTokens, ladder: Ladder | None) -> None:
        super().__init__(site, taps, answers=ladder is not None)
        self.names, self.depth = site.arguments, site.depth
        self.visible, self.ladder = visible, ladder

    def told(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], int]:
        given = {**dict(zip(self.names[1:], args, strict=False)), **kwargs}
        return given, cached_tokens(given, self.depth, x.shape[1])

    def answer(self, states: list[Tensor], told: tuple[dict[str, Any], int]) -> Tensor:
        ladder, (given, held) = self.ladder, told
        assert ladder is not None, "it answers"
        dtype = ladder.down.module.weight.dtype
        states = [state.flatten(1, -2).to(dtype) for state in states]  # [batch, tokens, d], also for images
        caches = side_layers(given, ladder.stamp, len(ladder.blocks), ladder.below)
        visible = self.visible.mask(held_by(caches, held), states[0].shape[1], given, states[0].device)
        return ladder.climb(states, visible, caches)


class LST(Method):
    """A small transformer in parallel with the model, which reads the outputs of its blocks; its output replaces the
    last block's output."""

    name = "lst"
    Config = LSTConfig
    tags = Tags(category="additive", paper="2206.06522", identity_at_init=False)
    learning_rate = LearningRate(
        3e-3, "ylsung/Ladder-Side-Tuning@1798e82, seq2seq/scripts/ladder_side_tuning_base.sh", on="T5-base, GLUE"
    )
    target = ("block",)

    def inject(self, model: nn.Module, config: LSTConfig, surgeon: Surgeon) -> None:
        places = beside(surgeon)
        sites = [site for site, _ in places]
        width, narrow = sites[0].width, config.width(sites[0].width)
        down = surgeon.own("down", lambda: nn.Linear(width, narrow))
        blocks = [surgeon.own(site.path.replace(".", "_"), lambda: config.block(width)) for site in sites]
        up = surgeon.own("up", lambda: nn.Sequential(nn.LayerNorm(narrow), nn.Linear(narrow, width)))
        visible = VisibleTokens(TokenStacks(surgeon).of(sites[0]))
        for site, taps in places:
            ladder = Ladder(down, blocks, up, site.blocks) if site is sites[-1] else None
            surgeon.graft(site, LadderOperator, taps=taps, visible=visible, ladder=ladder)

    @staticmethod
    def parameter_count(site: Site, config: LSTConfig) -> int:
        return 0  # the side network belongs to no site
