"""K-Adapter: a chain of adapters in parallel with the model, which read states of some of its layers.   Wang et al.
2020, arXiv 2002.01808 (code: microsoft/K-Adapter).

Equation:
    a_j = x_j + W_up T(W_down x_j + b_down) + b_up,   x_j = h_{l_j} + a_{j-1},   a_0 = 0
    y   = W [h ; a_J] + b   in the place of h,   or h + a_J   (`fusion`: "concat", "add")

h_l is the input of block l, h the output of the last block. T are transformer blocks like BERT's, of width w; the
adapters of a chain do not share parameters. The model's own states are unchanged, so it keeps its knowledge. Chains for
several kinds of knowledge are trained separately and do not interfere: two injections with "add" equal the sum of two
chains in the authors' code.

The chain's output is combined with h before the model's last norm, if the model has one. The model's cache also stores
the keys and values of the adapters.

Parameters, with J adapters of T blocks each: J (2 w d + w + d + T (12 w^2 + 13 w)), and 2 d^2 + d for W and b:
49,349,376 in RoBERTa-large.

Start: W_up and W_down start from N(0, 0.0002^2) with biases at 0, all other layers as torch's layers do. That is not an
identity; the authors train a head on the output. With ``identity=True`` W starts as [I 0], an identity.

Differs from the authors' code: Adapters do not attend to padding, while those in the authors' code do. In causal models
they do not attend to later tokens. The authors' code has one more linear layer, over two concatenations, and skip
connections between adapters; both are not implemented. The default layers, 0, 11 and 22 of 24, are those of the
authors' scripts; their README has 23.

Use it: `peftcore.apply(model, "k_adapter")`, where a separate task teaches knowledge for later tasks. If parameters
must be few or the adapter has to be merged, use `lora`. The similar `lst` reads every layer, and predicts without the
model's last state.
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
    """Numbers of the blocks, in ascending order, whose input an adapter reads; None uses 0, 11 and 22 of 24 blocks, and
    the same fractions in stacks of other lengths."""
    width: PositiveInt | None = None
    """Width w of the adapters; None uses three quarters of the model's width."""
    depth: PositiveInt = 2
    """Number of transformer blocks in an adapter."""
    heads: PositiveInt = 12
    """Number of heads of the adapters' attention; if it does not divide the width, their greatest common divisor is
    used."""
    dropout: Share = 0.1
    """Probability with which attention weights, and the outputs of attention and feed-forward, are dropped in
    training."""
    fusion: Literal["concat", "add"] = "concat"
    """How the last states of the model and of the chain are combined: by a linear layer on their concatenation
    ("concat"), or by their sum ("add")."""
    identity: bool = False
    """Start the linear layer so that it passes the model's own last state through."""

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
"""Standard deviation of both projections at the start."""


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
        """Map ``[batch, tokens, d]`` to the same shape; with a cache, each block uses one of its layers."""
        z = self.down(x)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            z = block(z, visible, cache)
        return x + self.up(z)


def joint(features: int, identity: bool) -> nn.Linear:
    """Make the linear layer that combines the last states of the model and of the chain."""
    made = nn.Linear(2 * features, features)
    if identity:
        nn.init.eye_(made.weight)
        nn.init.zeros_(made.bias)
    return made


@dataclass(frozen=True)
class Chain:
    """The adapters of one stack, and the states of the model that they read. The injection owns the parameters."""

    adapters: list[Shared]
    states: list[Tap]
    joint: Shared | None
    visible: VisibleTokens
    below: int
    """The number of blocks of the host's stack."""
    stamp: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)

    def joined(self, h: Tensor, given: dict[str, Any], held: int) -> Tensor:
        """Return the replacement of the model's last state `h`. `given` are the last block's arguments, which contain
        masks and caches."""
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
    """Stores a block's input for the chain if an adapter reads it. After the last block, combines the states of model
    and chain."""

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
    """A chain of adapters in parallel with the model, which read states of some layers. Its output is combined with the
    model's last state."""

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
