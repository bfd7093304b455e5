"""Parallel adapter.   He et al. 2021, arXiv 2110.04366 (code: jxhe/unify-parameter-efficient-tuning).

Equation:
    out = Block(x) + s (W_up f(W_down x + b_down) + b_up),   W_down [r, d],  W_up [d, r]

x is exactly the tensor that the block reads (after the norm in front of it, if there is one). The block is the
feed-forward by default, the attention with ``target="attn.output"``, and otherwise the target module itself. The scale
s is 4, as in the paper, or it is learned and starts at 1. Dropout acts on f's output, as in the authors' code.

The adapter reads x at the block's first matrix. Its output is added at the residual sum, after the host's dropout and
layer scale, as in the authors' code; with joins="matrix" it is added to the output of the block's last matrix. So
models are supported in which the feed-forward is not a separate module (BERT, torch's encoder).

With reads="matrix" it is parallel to the target module itself: y = W x + A(x), as in LLM-Adapters
(`llm_adapters_parallel`).

Parameters: 2 d r + r + d a block, or 2 d r without `bias`, and one more if s is learned.

Start: W_down starts as in LoRA, from a Kaiming-uniform draw, W_up and the biases at zero: an exact identity.

Differs from the authors' code: No difference is known.

Use it: `peftcore.apply(model, "parallel_adapter")`, instead of a serial adapter (`houlsby_adapter`); in the paper's
comparison the parallel one is better. It cannot be merged.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    ACTIVATIONS,
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
    branch_end,
)
from peftcore_additive._bottleneck import cast_linear


class ParallelAdapterConfig(MethodConfig):
    """Options of the parallel adapter."""

    method: Literal["parallel_adapter"] = "parallel_adapter"
    bottleneck: PositiveInt = 64
    """Width r of the bottleneck; 512 in the paper's tables."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "relu"
    """The non-linearity f."""
    scale: PositiveFloat | Literal["learned"] = 4.0
    """The factor on the adapter's output. "learned" trains one factor for each block, which starts at 1."""
    reads: Literal["branch", "stream", "matrix"] = "branch"
    """The adapter's input: the block's input ("branch"), the stream in front of the block's norm ("stream", as in the
    adapters package for pre-norm models), or the input of the target module ("matrix")."""
    joins: Joins = "stream"
    """Where the adapter's output is added: to the stream, after the host's dropout, layer scale and stochastic depth
    ("stream"), or to the output of the branch's last matrix, before them ("matrix")."""
    dropout: Share = 0.0
    """Dropout probability of the bottleneck's activations in training."""
    bias: bool = True
    """Add biases to both matrices."""
    init: Literal["lora", "normal"] = "lora"
    """The start: as in LoRA, which is an exact identity ("lora"), or both matrices from N(0, 0.02) ("normal")."""


class ParallelOperator(Bypass):
    """The bottleneck in parallel with one block."""

    padded = frozenset({"down.weight", "down.bias", "up.weight"})

    def __init__(self, site: BranchSite, config: ParallelAdapterConfig) -> None:
        super().__init__(site)
        self.down = nn.Linear(site.width, config.bottleneck, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(config.bottleneck, site.out_features, bias=config.bias)
        self.scale = nn.Parameter(torch.ones(1)) if config.scale == "learned" else config.scale
        if config.init == "lora":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        for linear in (self.down, self.up):
            if config.init == "normal":
                nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def beside(self, x: Tensor) -> Tensor:
        inner = self.dropout(self.activation(cast_linear(self, self.down, x)))  # [..., r]
        scale = self.scale.to(x.dtype) if isinstance(self.scale, Tensor) else self.scale
        return scale * cast_linear(self, self.up, inner)


class ParallelAdapter(Method):
    """A bottleneck in parallel with each feed-forward."""

    name = "parallel_adapter"
    Config = ParallelAdapterConfig
    tags = Tags(category="additive", paper="2110.04366")
    learning_rate = LearningRate(
        5e-5, "jxhe/unify-parameter-efficient-tuning@3222ce2, exps/run_xsum.sh", on="BART-large, XSum"
    )
    target = ("mlp.output",)
    alternatives = OUTPUTS

    config_version = 2
    former_defaults = ({"joins": "matrix"},)

    def inject(self, model: nn.Module, config: ParallelAdapterConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            own = config.at(site.path)
            if own.reads == "matrix":
                place = replace(branch_end(surgeon, site, own.joins, adds=True), width=site.in_features)
            else:
                place = branch(surgeon, site, before_norm=own.reads == "stream", joins=own.joins)
            surgeon.graft(place, ParallelOperator, config, place.places)

    @staticmethod
    def parameter_count(site: BranchSite, config: ParallelAdapterConfig) -> int:
        r, biases = config.bottleneck, (config.bottleneck + site.out_features) * config.bias
        return (site.width + site.out_features) * r + biases + (config.scale == "learned")
