"""The common bottleneck of serial adapters: two linear maps with a non-linearity between them, and optionally a layer
norm, a scale and stochastic depth."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from peftcore.author import ACTIVATIONS, AtBranchEnd, BlockSite, BranchSite, Operator, Site

Start = Literal["cut", "normal"]
Scale = PositiveFloat | Literal["learned", "channel"]


def width_of(site: Site) -> int:
    """Return the number of features that an adapter reads and adds at a site: the width of a block or branch, or else
    the number of the site's outputs."""
    width = site.width if isinstance(site, BlockSite | BranchSite) else 0
    return width or site.out_features


def learned_scale(scale: Scale, width: int) -> int:
    """Return the number of trained parameters of a scale: none, one, or one for each feature."""
    return {"learned": 1, "channel": width}.get(str(scale), 0)


def draw(weight: Tensor, std: float, start: Start) -> None:
    """Draw a matrix from a normal distribution, optionally truncated at two standard deviations."""
    if not std:
        nn.init.zeros_(weight)
    elif start == "cut":
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.normal_(weight, std=std)


def cast_linear(operator: Operator, linear: nn.Linear, x: Tensor) -> Tensor:
    """Return the output of a linear layer that belongs to an operator, computed in the dtype of the input."""
    held = (linear.weight,) if linear.bias is None else (linear.weight, linear.bias)
    return nn.functional.linear(x, *operator.cast(x, *held))


class BottleneckOperator(AtBranchEnd):
    """Adds a bottleneck to the output of a branch. If the output is a tuple, it changes the first entry."""

    stackable = True
    padded = frozenset({"down.weight", "down.bias", "up.weight"})

    def __init__(self, site: Site, config: Any, *, start: Start = "cut", bias: bool = True) -> None:
        super().__init__(site)
        self.down = nn.Linear(width_of(site), config.bottleneck, bias=bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.up = nn.Linear(config.bottleneck, width_of(site), bias=bias)
        for linear, std in ((self.down, config.init_std), (self.up, config.up_init_std)):
            draw(linear.weight, std, start)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def adapt(self, h: Tensor) -> Tensor:
        return h + self.added(h)

    def added(self, h: Tensor) -> Tensor:
        """Return the adapter's output, in the layout of its input."""
        return self.layer.channels_back(self.bottleneck(self.layer.channels_last(h)))

    def bottleneck(self, h: Tensor) -> Tensor:
        """Map [..., d] to [..., d] through the bottleneck of width r."""
        return cast_linear(self, self.up, self.activation(cast_linear(self, self.down, h)))


class ScaledOperator(BottleneckOperator):
    """A bottleneck with an optional scale, optional stochastic depth, and an optional layer norm in front."""

    training_only = BottleneckOperator.training_only | {"drops"}

    def __init__(self, site: Site, config: Any, *, norm: bool = False, bias: bool = True) -> None:
        super().__init__(site, config, start=config.init, bias=bias)
        self.norm = nn.LayerNorm(width_of(site)) if norm else None
        learned = learned_scale(config.scale, width_of(site))
        self.scale: float | nn.Parameter = nn.Parameter(torch.ones(learned)) if learned else config.scale
        self.drops = config.stochastic_depth
        self.stackable = not self.drops

    def bottleneck(self, h: Tensor) -> Tensor:
        if self.norm is not None:
            weight, bias = self.cast(h, self.norm.weight, self.norm.bias)
            h = nn.functional.layer_norm(h, weight.shape, weight, bias, self.norm.eps)
        y = super().bottleneck(h)
        if self.training and self.drops:
            keeps = y.new_empty(len(y), *[1] * (y.dim() - 1)).bernoulli_(1 - self.drops)
            y = y * keeps / (1 - self.drops)
        if isinstance(self.scale, Tensor):
            return y * self.scale.to(y.dtype)
        return y if self.scale == 1 else y * self.scale
