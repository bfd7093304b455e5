"""MoLoRA: a soft mixture of LoRAs.   Zadouri et al. 2023, arXiv 2309.05444 (for-ai/parameter-efficient-moe).

Equation:
    y = W x + b + s sum_e g_e B_e A_e x,   g = softmax(W_g x),   s = alpha / rank

All experts act on each token, so no balancing loss is needed and no token is dropped. A_e [rank, in] and the router W_g
[experts, in] are without bias; the softmax is taken in float32 at least. Every matrix of attention and of the
feed-forward has separate experts and a separate router, as in the authors' configuration. For convolutions, A and W_g
are convolutions too.

The gate depends on the token, so the method cannot be merged. Tensors that the model reads without calling their module
are refused.

Parameters: experts * rank * (in * kernel + out) + experts * in * kernel per site.

Start: A_e and W_g from N(0, 0.02), B_e at zero; of embeddings A at zero and B_e ~ N(0, 1). A fresh adapter is the
identity.

Differs from the authors' code: No difference is known.

Use it: `peftcore.apply(model, "molora_moe")`, for instructions of many kinds, where `mov` is too small; `hydralora`
shares one A among experts, and `loramoe` balances them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Site, Surgeon, Tags, full_precision
from peftcore_multitask._mixture import ExpertsOperator, softmax_of

STD = 0.02
"""Standard deviation of A and of the router at the start."""


class MoLoRAConfig(MethodConfig):
    """Options of MoLoRA."""

    method: Literal["molora_moe"] = "molora_moe"
    experts: PositiveInt = 10
    """Number of low-rank updates (experts) of a site."""
    rank: PositiveInt = 4
    """Rank of each low-rank update."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / rank``."""


class MoLoRAOperator(ExpertsOperator):
    """The experts of one site, and their router."""

    def __init__(self, site: Site, config: MoLoRAConfig) -> None:
        super().__init__(site, config.experts, config.rank, config.alpha / config.rank)
        self.start_normal(STD)
        self.router = nn.Parameter(torch.randn(config.experts, site.in_features, *site.kernel) * STD)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        precise = torch.promote_types(self.router.dtype, torch.float32)
        with full_precision(x):
            read = x if self.layer.one_hot else x.to(precise)
            gates = softmax_of(self, self.layer.apply(read, self.router.to(precise)))
        self.noted(gates, self.layer.channel_dim)
        return self.update(call, x, gates)


class MoLoRA(Method):
    """Low-rank experts, all of which act on each token, mixed by the token's shares."""

    name = "molora_moe"
    Config = MoLoRAConfig
    tags = Tags(category="multitask", paper="2309.05444", routes="token")
    learning_rate = LearningRate(
        3e-4,
        "for-ai/parameter-efficient-moe@e2683fe, configs/molora.gin",
        on="T5 1.1 large, P3",
        optimizer="Adafactor",
    )
    target = ("attn.*", "cross.*", "mlp.gate", "mlp.up", "mlp.down")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: MoLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, MoLoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: MoLoRAConfig) -> int:
        inputs = site.in_features * math.prod(site.kernel)
        return config.experts * (config.rank * (inputs + site.out_features) + inputs)
