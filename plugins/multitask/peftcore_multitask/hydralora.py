"""HydraLoRA: one A, several B, a gate for each token.   Tian et al. 2024, arXiv 2404.19245 (Clin0212/HydraLoRA).

Equation:
    y = W x + b + s sum_e g_e B_e A dropout(x),   s = alpha / rank,   g = softmax(W_g x)

A [rank, in] learns the common features of the data, the heads B_e [out, rank] the features of parts of it; W_g [heads,
in] is without bias. The softmax is taken in float32 at least. For convolutions, A and W_g are convolutions too, so
every position has a gate. For embeddings, W_g has a column for each token.

As in the authors' code, the gate reads x without dropout, and each head has a separate dropout; the paper leaves this
open. The gate depends on the token, so the method cannot be merged. Tensors that the model reads without calling their
module are refused.

Parameters: rank * in * kernel + heads * rank * out + heads * in * kernel per site.

Start: A and W_g uniform in +-1/sqrt(in), B_e at zero; of embeddings A at zero and B_e ~ N(0, 1). A fresh adapter is the
identity.

Differs from the authors' code: No difference is known; the defaults are those of the authors' script fine-tuning.sh.
The paper finds the number of heads by clustering the data; here it is an option.

Use it: `peftcore.apply(model, "hydralora")`, for data of several kinds without labels of the kind: it needs no task,
and costs less than as many LoRAs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Router, Share, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_multitask._skills import factors


class HydraLoRAConfig(MethodConfig):
    """Options of HydraLoRA."""

    method: Literal["hydralora"] = "hydralora"
    rank: PositiveInt = 4
    """Rank of each head's update."""
    heads: PositiveInt = 4
    """Number of heads, each with a separate B_e."""
    alpha: PositiveFloat = 32.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.05
    """Dropout probability of the inputs of each head's update."""


class HydraLoRAOperator(Router):
    """The shared A, the heads and the gate of one site."""

    stackable = True

    def __init__(self, site: Site, config: HydraLoRAConfig) -> None:
        super().__init__(site)
        if config.dropout and self.layer.one_hot:
            raise UnsupportedSite(
                f"{site.path} reads token ids, which dropout cannot act on; use dropout=0 or exclude it"
            )
        self.scale, self.heads = config.alpha / config.rank, config.heads
        self.dropout = nn.Dropout(config.dropout)
        inputs, outputs = site.in_features, site.out_features
        self.A, self.B = factors(site, (config.rank, inputs), (config.heads, outputs, config.rank), inputs)
        bound = 1 / math.sqrt(inputs * math.prod(site.kernel))
        self.gate = nn.Parameter(torch.empty(config.heads, inputs, *site.kernel).uniform_(-bound, bound))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y, channels = call(x), self.layer.channel_dim
        A, B, gate = self.cast(y, self.A, self.B, self.gate)
        logits = self.layer.apply(x, gate)
        shares = logits.softmax(channels, dtype=torch.promote_types(logits.dtype, torch.float32))
        self.noted(shares, channels)
        (shares,) = self.cast(y, shares)  # channels: heads
        draws = self.heads if self.training and self.dropout.p else 1
        lows = [self.layer.apply(self.dropout(x), A) for _ in range(draws)]  # channels: rank
        mixed = [lows[e % draws] * shares.narrow(channels, e, 1) for e in range(self.heads)]
        return self.layer.add(y, torch.cat(mixed, channels), B.transpose(0, 1).flatten(1), self.scale)


class HydraLoRA(Method):
    """Low-rank adaptation with one A and several gated B."""

    name = "hydralora"
    Config = HydraLoRAConfig
    tags = Tags(category="multitask", paper="2404.19245", random=True, routes="token")
    learning_rate = LearningRate(2e-4, "Clin0212/HydraLoRA@afb693b, HydraLoRA/fine-tuning.sh", on="LLaMA")
    config_version = 2
    former_defaults = ({"rank": 8, "dropout": 0.0},)
    target = ("mlp.gate", "mlp.up", "mlp.down")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: HydraLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, HydraLoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: HydraLoRAConfig) -> int:
        inputs = site.in_features * math.prod(site.kernel)
        return (config.rank + config.heads) * inputs + config.heads * config.rank * site.out_features
