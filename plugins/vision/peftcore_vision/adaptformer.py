"""AdaptFormer.   Chen et al. 2022, arXiv 2205.13535 (code: ShoufaChen/AdaptFormer).

Equation:
    out = MLP(LN(x)) + s (W_up relu(W_down x + b_down) + b_up) + x,   W_down [r, d],  W_up [d, r]

x is the residual stream in front of the feed-forward's norm. With layer_norm="in" a separate LN normalizes the
adapter's input, with "out" its output.

The feed-forward's norm is the norm whose output the feed-forward reads. Without such a norm (Swin V2), x is the
feed-forward's input. In post-norm blocks (BERT, torch's encoder) it is the norm after attention, so by default x is the
input of this norm. With reads="branch" x is the feed-forward's input in every model. The model's dropout, layer scale
and stochastic depth after the feed-forward do not act on the adapter's output, as in the authors' code. With
joins="matrix" they do.

Parameters: 2 d r + r + d per block, 2 d more with a norm, one more when s is learned.

Start: W_down starts from a Kaiming-uniform draw, W_up and the biases at zero. A fresh adapter is an exact identity.

Differs from the authors' code: No difference is known. The paper's equation normalizes the adapter's input; the
authors' code does so only with layer_norm="in".

Use it: `peftcore.apply(model, "adaptformer")`, to adapt image and video transformers to pictures of another domain. It
cannot be merged.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.author import (
    OUTPUTS,
    BranchSite,
    Bypass,
    Joins,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Surgeon,
    Tags,
    branch,
)


class AdaptFormerConfig(MethodConfig):
    """Options of AdaptFormer."""

    method: Literal["adaptformer"] = "adaptformer"
    bottleneck: PositiveInt = 64
    """Width r of the bottleneck."""
    scale: PositiveFloat | Literal["learned"] = 0.1
    """The factor s in front of the adapter; "learned" trains a separate s for each block, starting at 1."""
    layer_norm: Literal["none", "in", "out"] = "none"
    """Add a trained norm on the adapter's input ("in") or on its output ("out")."""
    reads: Literal["stream", "branch"] = "stream"
    """The adapter's input. "stream": the residual stream in front of the feed-forward's norm. "branch": the input of
    the feed-forward itself."""
    joins: Joins = "stream"
    """Where the adapter's output is added. "stream": to the residual stream, after the host's dropout, layer scale and
    stochastic depth. "matrix": to the output of the branch's last matrix, before these operations."""
    dropout: Share = 0.1
    """Dropout probability of the bottleneck's activations, as in the authors' code."""


class AdaptFormerOperator(Bypass):
    """The bottleneck in parallel with one feed-forward."""

    padded = frozenset({"down.weight", "down.bias", "up.weight"})

    def __init__(self, site: BranchSite, config: AdaptFormerConfig) -> None:
        super().__init__(site)
        self.normed = config.layer_norm
        if self.normed != "none":
            self.layer_norm = nn.LayerNorm(site.width if self.normed == "in" else site.out_features)
        self.down = nn.Linear(site.width, config.bottleneck)
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(config.bottleneck, site.out_features)
        self.scale = nn.Parameter(torch.ones(1)) if config.scale == "learned" else config.scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def beside(self, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = self.cast(x, self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        read = self._norm(x) if self.normed == "in" else x
        inner = self.dropout(torch.relu(F.linear(read, down, down_bias)))  # [..., r]
        scale = self.scale.to(x.dtype) if isinstance(self.scale, Tensor) else self.scale
        added = scale * F.linear(inner, up, up_bias)
        return self._norm(added) if self.normed == "out" else added

    def _norm(self, x: Tensor) -> Tensor:
        gain, bias = self.cast(x, self.layer_norm.weight, self.layer_norm.bias)
        return F.layer_norm(x, gain.shape, gain, bias, self.layer_norm.eps).to(x.dtype)


class AdaptFormer(Method):
    """A bottleneck in parallel with each feed-forward of an image transformer."""

    name = "adaptformer"
    Config = AdaptFormerConfig
    tags = Tags(category="vision", paper="2205.13535", random=True)
    learning_rate = LearningRate(
        0.4,
        "ShoufaChen/AdaptFormer@6967d67, README.md",
        on="ViT-B/16, CIFAR-100, batches of 1,024",
        optimizer="SGD",
        momentum=0.9,
    )
    target = ("mlp.output",)
    alternatives = OUTPUTS

    config_version = 2
    former_defaults = ({"joins": "matrix", "dropout": 0.0},)

    def inject(self, model: nn.Module, config: AdaptFormerConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            own = config.at(site.path)
            place = branch(surgeon, site, before_norm=own.reads == "stream", joins=own.joins)
            surgeon.graft(place, AdaptFormerOperator, config, place.places)

    @staticmethod
    def parameter_count(site: BranchSite, config: AdaptFormerConfig) -> int:
        bottleneck = (site.width + site.out_features) * config.bottleneck + config.bottleneck + site.out_features
        norm = {"none": 0, "in": 2 * site.width, "out": 2 * site.out_features}[config.layer_norm]
        return bottleneck + norm + (config.scale == "learned")
