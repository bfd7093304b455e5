"""K-Adapter: a chain of adapters beside the model, which read states of some of its layers.   Wang et al. 2020,
arXiv 2002.01808 (code: microsoft/K-Adapter).

Equation:
    a_j = x_j + W_up T(W_down x_j + b_down) + b_up,   x_j = h_{l_j} + a_{j-1},   a_0 = 0
    y   = W [h ; a_J] + b   in the place of h,   or h + a_J   (`fusion`: "concat", "add")

h_l is the input of block l, h the output of the last block. T are transformer blocks like BERT's, w wide; the adapters
of a chain share nothing. The model inside is unchanged, so earlier knowledge is kept, and chains for several kinds of
knowledge, each trained alone, do not interfere: two injections with "add" equal the sum of two chains in the authors'
code.

The join is in front of the model's last norm, where it has one. The model's cache also stores the keys and values of
the adapters.

Parameters: J (2 w d + w + d + T (12 w^2 + 13 w)), and 2 d^2 + d for W and b: 49,349,376 in RoBERTa-large.

Start: W_up and W_down start from N(0, 0.0002^2), biases of both at 0, all else as torch's layers do: no identity, as
the authors train a head behind. With `identity` W starts as [I 0].

Differs from the authors' code: Padding is not seen by adapters, as it is in the code, nor are later tokens in causal
models. A further linear layer over two concatenations and adapters that skip others are not here. The layers are those
of the scripts, 0, 11 and 22 of 24; the README has 23.

Use it: `peftcore.apply(model, "k_adapter")`, where a separate task teaches knowledge for later tasks; not where
parameters must be few, nor where the model is to be merged (`lora`). `lst` is its kin that reads every layer and
predicts by itself.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    BlockSite,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
    Tap,
    TokenStacks,
    VisibleTokens,
    block_sites,
    cached_tokens,
    on_first,
)
from peftcore.errors import TargetError
from peftcore_additive._side import PostNormBlock, held_by, side_layers


class KAdapterConfig(MethodConfig):
    """Options of K-Adapter."""

    overridable = ()

    method: Literal["k_adapter"] = "k_adapter"
    layers: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    """Numbers of the target blocks that have an adapter, which reads what the block reads, in ascending order; None
    takes 0, 11 and 22 of 24 blocks, and those that are as far up in others."""
    width: PositiveInt | None = None
    """Width w of the adapters; None takes three quarters of the model's."""
    depth: PositiveInt = 2
    """Transformer blocks in an adapter."""
    heads: PositiveInt = 12
    """Heads of their attention; their greatest common divisor with the width, where they do not divide it."""
    dropout: Share = 0.1
    """Probability with which attention weights, and the outputs of attention and feed-forward, are dropped in
    training."""
    fusion: Literal["concat", "add"] = "concat"
    """The way in which the last states of model and chain are combined: a linear layer on their concatenation, or the
    sum."""
    identity: bool = False
    """Start with the model's own last state, which the linear layer passes through."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.layers is not None and any(a >= b for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise ValueError("layers= must be numbers in ascending order, without repetition")
        if self.identity and self.fusion == "add":
            raise ValueError(
                "identity=True needs fusion='concat': the sum of fusion='add' always differs from the model's state"
            )
        return self


STD = 0.0002
"""Deviation of the start of both projections."""


class Adapter(nn.Module):
    """One adapter of a chain."""

    def __init__(self, features: int, config: KAdapterConfig) -> None:
        super().__init__()
        width = config.width or max(1, 3 * features // 4)
        self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        self.blocks = nn.ModuleList(PostNormBlock(width, config.heads, config.dropout) for _ in range(config.depth))
        for projection in (self.down, self.up):
            nn.init.normal_(projection.weight, std=STD)
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor, visible: Tensor, caches: Sequence[Any]) -> Tensor:
        """Map ``[batch, tokens, d]`` to the same shape; each block has a layer of a cache, where there is one."""
        z = self.down(x)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            z = block(z, visible, cache)
        return x + self.up(z)


def joint(features: int, identity: bool) -> nn.Linear:
    """Make the linear layer that reads the last states of the model and of the chain."""
    made = nn.Linear(2 * features, features)
    if identity:
        nn.init.eye_(made.weight)
        nn.init.zeros_(made.bias)
    return made


@dataclass(frozen=True)
class Chain:
    """The adapters of one stack, and the block whose input each one reads; they belong to the injection."""

    adapters: list[Shared]
    states: list[Tap]
    joint: Shared | None
    visible: VisibleTokens
    below: int
    """How many blocks the host's stack has."""
    stamp: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)

    def joined(self, h: Tensor, given: dict[str, Any], held: int) -> Tensor:
        """Return the replacement of the last state ``[batch, tokens, d]``, by the last block's arguments."""
        adapters: list[Any] = [adapter.module for adapter in self.adapters]
        depth, dtype = len(adapters[0].blocks), adapters[0].down.weight.dtype
        caches = side_layers(given, self.stamp, depth * len(adapters), self.below)
        last = h.flatten(1, -2).to(dtype)  # [batch, tokens, d], also for images
        visible, a = self.visible.mask(held_by(caches, held), last.shape[1], given, h.device), torch.zeros_like(last)
        for number, (adapter, state) in enumerate(zip(adapters, self.states, strict=True)):
            x = state.get().flatten(1, -2).to(dtype) + a
            a = adapter(x, visible, caches[number * depth : (number + 1) * depth])
        y = last + a if self.joint is None else self.joint.module(torch.cat([last, a], -1))
        return y.to(h.dtype).view_as(h)


class KAdapterOperator(Operator):
    """Stores a block's input for the chain, where an adapter reads it; behind the last block, joins model and chain."""

    def __init__(self, site: BlockSite, state: Tap | None, chain: Chain | None) -> None:
        super().__init__(site)
        self.names, self.depth = site.arguments, site.depth
        self.state, self.chain = state, chain

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.state is not None:
            self.state.put(x)
        chain = self.chain
        if chain is None:
            return call(x, *args, **kwargs)
        given = {**dict(zip(self.names[1:], args, strict=False)), **kwargs}
        held = cached_tokens(given, self.depth, x.shape[1])  # before the block adds its own
        return on_first(call(x, *args, **kwargs), lambda h: chain.joined(h, given, held))


class KAdapter(Method):
    """A chain of adapters in parallel with the model, which read states of some layers; its output joins the last
    state."""

    name = "k_adapter"
    Config = KAdapterConfig
    tags = Tags(
        category="additive",
        paper="2002.01808",
        identity_at_init=False,
        identity_options={"identity": True},
        random=True,
        reentrant=False,
    )
    learning_rate = LearningRate(
        5e-5, "microsoft/K-Adapter@43651cd, run_pretrain_fac-adapter.sh", on="RoBERTa-large, relations of T-REx"
    )
    target = ("block",)

    def inject(self, model: nn.Module, config: KAdapterConfig, surgeon: Surgeon) -> None:
        stacks = TokenStacks(surgeon)
        sites = stacks.answering(block_sites(surgeon), surgeon.wishes.target is not None)
        count, width = len(sites), sites[0].width
        layers = config.layers or sorted({number * count // 24 for number in (0, 11, 22)})
        if layers[-1] >= count:
            raise TargetError(f"layers={layers[:9]}: the layers of this model are 0 to {count - 1}")
        states = {number: Tap(until_backward=True) for number in layers}
        adapters = [surgeon.own(f"adapter_{number}", lambda: Adapter(width, config)) for number in layers]
        joins = surgeon.own("joint", lambda: joint(width, config.identity)) if config.fusion == "concat" else None
        visible = VisibleTokens(stacks.of(sites[0]))
        chain = Chain(adapters, list(states.values()), joins, visible, sites[-1].blocks)
        for number, site in enumerate(sites):
            state, ends = states.get(number), chain if number == count - 1 else None
            if state or ends:
                surgeon.graft(site, KAdapterOperator, state=state, chain=ends)

    @staticmethod
    def parameter_count(site: Site, config: KAdapterConfig) -> int:
        return 0  # the chain belongs to no site
