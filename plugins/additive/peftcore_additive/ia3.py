"""(IA)^3: infused adapter by inhibiting and amplifying inner activations.   Liu et al. 2022, arXiv 2205.05638.

Equation:
    k' = l_k * (W_k x),   v' = l_v * (W_v x),   y = W_2 (l_ff * f(W_1 x))

Keys and values are scaled at the output of their projection (bias included), the feed-forward's inner activations at
the input of the second matrix.

Parameters: the width of each scaled activation: the outputs of a key or value projection, the inputs of the second
matrix (separately for each expert).

Start: All l are one: the identity.

Differs from the authors' code: The authors' code was not compared.

Use it: `peftcore.apply(model, "ia3")`, where training examples are few: it trains only a few thousand numbers. Use a
high learning rate (3e-3 in the paper), and train without weight decay, which pulls gains to 0 instead of 1.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite


class IA3Config(MethodConfig):
    """Options of (IA)^3."""

    method: Literal["ia3"] = "ia3"
    scale_inputs: list[str] = Field(default_factory=lambda: ["mlp.down", "experts.down", "attn_mlp.out"])
    """Sites whose input is scaled instead of their output: roles, or globs for site paths (peft's
    `feedforward_modules`)."""


def scales_input(site: Site, config: IA3Config) -> bool:
    """Return True if the vector scales the inputs of the site's linear map instead of its outputs."""
    return any(site.role == each or fnmatch.fnmatchcase(site.path, each) for each in config.scale_inputs)


def gain_width(site: Site, config: IA3Config) -> int:
    """Return the number of gains for each expert: the number of outputs, or of inputs over all groups of a
    convolution."""
    return site.in_features * getattr(site.module, "groups", 1) if scales_input(site, config) else site.out_features


class IA3Operator(Operator):
    """Scales inputs or outputs of one module by a vector of gains."""

    stackable = True

    def __init__(self, site: Site, config: IA3Config) -> None:
        super().__init__(site)
        self.on_input = self.changes_inputs = scales_input(site, config)
        if self.on_input and self.layer.one_hot:
            raise UnsupportedSite(f"{site.path} reads token ids, which cannot be scaled; remove it from scale_inputs")
        self.gain = nn.Parameter(torch.ones(*site.batch, gain_width(site, config)))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        if self.on_input:
            (gain,) = self.cast(x, self.gain)
            return call(x * self.layer.along_channels(gain, x))
        y = call(x)
        (gain,) = self.cast(y, self.gain)
        return y * self.layer.along_channels(gain, y)

    def merged(self, weight: Tensor) -> Tensor:
        dims = self.layer.batch_dims
        if not self.on_input:
            return weight * self.gain.view(*self.gain.shape, *[1] * (weight.dim() - dims - 1))
        gain = self.gain.unflatten(-1, (-1, 1, weight.shape[dims + 1]))  # [*batch, groups, 1, in]
        rows = weight.unflatten(dims, (gain.shape[dims], -1))  # [*batch, groups, out, in, *kernel]
        return (rows * gain.view(*gain.shape, *[1] * (rows.dim() - gain.dim()))).flatten(dims, dims + 1)

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        return bias if bias is None or self.on_input else bias * self.gain


class IA3(Method):
    """Learned gains for keys, values and inner activations of the feed-forward."""

    name = "ia3"
    Config = IA3Config
    tags = Tags(category="additive", paper="2205.05638", mergeable=True)
    learning_rate = LearningRate(
        3e-3, "r-three/t-few@114dece, configs/ia3.json", on="T0-3B, tasks of T-Few", optimizer="Adafactor"
    )
    target = ("attn.k", "attn.v", "cross.k", "cross.v", "mlp.down", "experts.down")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: IA3Config, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, IA3Operator, config)

    @staticmethod
    def parameter_count(site: Site, config: IA3Config) -> int:
        return math.prod(site.batch) * gain_width(site, config)
