"""Parallel adapter.   He et al. 2021, arXiv 2110.04366 (code: jxhe/unify-parameter-efficient-tuning).

    out = Block(x) + s (W_up f(W_down x + b_down) + b_up),   W_down [r, d],  W_up [d, r]

x is the very tensor that the block reads (behind the norm in front of it, where there is one). The block is the
feed-forward by default; with ``target="attn.output"`` the attention, and any other module that is targeted is a block
of its own. W_down starts as in LoRA, from a Kaiming-uniform draw, W_up and the biases at zero: an exact identity. The
scale s is the paper's 4, or learned from 1. Dropout acts on f's output, as in the authors' code.

What the block reads is taken where its first matrix reads it, and added where its last matrix returns: so hosts whose
feed-forward is no module of its own (BERT, torch's encoder) are adapted like those where it is one.

Parameters: 2 d r + r + d a block, one more when s is learned.

Use it where a serial adapter would do; in the paper's comparison it is the stronger of the two. It cannot be merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore import Method, MethodConfig, Operator, Site, Surgeon, Tags, Tap, on_first
from peftcore.errors import UnsupportedSite
from peftcore_additive.houlsby_adapter import ACTIVATIONS

READERS = {
    "mlp.down": {"mlp.gate_up", "mlp.gate", "mlp.up"},
    "attn.out": {"attn.qkv", "attn.q", "attn.q_a"},
    "cross.out": {"cross.qkv", "cross.q", "cross.q_a"},
    "attn_mlp.out": {"attn_mlp.in", "attn.qkv", "attn.q"},
}
"""By the role of a block's last matrix, the roles of the first ones, which read what the block reads."""


class Config(MethodConfig):
    """Options of the parallel adapter."""

    method: Literal["parallel_adapter"] = "parallel_adapter"
    bottleneck: PositiveInt = 64
    """Width r of the bottleneck; 512 in the paper's tables."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "relu"
    """The non-linearity f."""
    scale: PositiveFloat | Literal["learned"] = 4.0
    """The factor s in front of the adapter; "learned" trains one for each block, from 1."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability with which the bottleneck's numbers are dropped in training."""


@dataclass(frozen=True, eq=False)
class BlockSite(Site):
    """Where a block begins or ends."""

    width: int = 0
    """Width of what the adapter reads; 0 where the block begins, which is where it is read and nothing else."""


class ReaderOperator(Operator):
    """Leaves what a block reads for the adapter at the block's end."""

    def __init__(self, site: Site, tap: Tap) -> None:
        super().__init__(site)
        self.tap = tap

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.tap.put(x)
        return call(x, *args, **kwargs)


class ParallelOperator(Operator):
    """Adds the adapter of what the block read to what it returns."""

    def __init__(self, site: BlockSite, config: Config, tap: Tap | None) -> None:
        super().__init__(site)
        if self.layer.channel_dim != -1 or self.layer.one_hot:
            raise UnsupportedSite(f"{site.path}: a bottleneck adapter needs features in the last dimension")
        self.tap = tap
        self.down = nn.Linear(site.width, config.bottleneck)
        self.activation = ACTIVATIONS[config.activation]()
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(config.bottleneck, site.out_features)
        self.scale = nn.Parameter(torch.ones(1)) if config.scale == "learned" else config.scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = call(x, *args, **kwargs)
        read = x if self.tap is None else self.tap.take()
        return on_first(output, lambda y: y + self._adapter(read.to(y.dtype)))

    def _adapter(self, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = self.cast(x, self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        inner = self.dropout(self.activation(nn.functional.linear(x, down, down_bias)))  # [..., r]
        scale = self.scale.to(x.dtype) if isinstance(self.scale, Tensor) else self.scale
        return scale * nn.functional.linear(inner, up, up_bias)


def _reader(surgeon: Surgeon, site: Site) -> Site | None:
    """The first matrix of the block that ends with a site's matrix; None where the site is a block of its own."""
    host = surgeon.resolver.host
    last = next((entry for entry in host.at(site.module_path) if entry.role in READERS), None)
    if last is None:
        return None
    inside = [entry for entry in host.entries if entry.block == last.block and entry.called and entry.tensor is None]
    first = [entry for entry in inside if entry.role in READERS[last.role]]
    nearest = max(first, key=lambda entry: _steps_shared(entry.path, last.path), default=None)
    if nearest is None:
        raise UnsupportedSite(f"{site.path}: no matrix that is called reads what its block reads")
    return replace(surgeon.resolver.site(nearest.module, "weight", nearest.role), form="activation", meta=site.meta)


def _steps_shared(path: str, other: str) -> int:
    """How many steps from the host down two paths have in common."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(path.split("."), other.split("."), strict=False))))


class ParallelAdapter(Method):
    """A bottleneck beside each feed-forward."""

    name = "parallel_adapter"
    Config = Config
    tags = Tags(category="additive", paper="2110.04366", checked_against="the equation in float64")
    target = ("mlp.output",)

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            self._adapt(site, _reader(surgeon, site), config, surgeon)

    @staticmethod
    def _adapt(site: Site, reader: Site | None, config: Config, surgeon: Surgeon) -> None:
        tap = None
        if reader is not None:
            tap, width = Tap(), reader.in_features
            surgeon.graft(BlockSite(**vars(reader)), lambda first: ReaderOperator(first, tap))
        else:  # a matrix says what it reads; a mixture or an attention returns what it reads: the stream's width
            width = site.in_features if site.tensor == "weight" else site.out_features
        surgeon.graft(BlockSite(**vars(site), width=width), lambda last, own: ParallelOperator(last, own, tap), config)

    @staticmethod
    def parameter_count(site: BlockSite, config: Config) -> int:
        bottleneck = (site.width + site.out_features) * config.bottleneck + config.bottleneck + site.out_features
        return bottleneck + (config.scale == "learned") if site.width else 0
