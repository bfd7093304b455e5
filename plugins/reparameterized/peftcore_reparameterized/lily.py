"""Lily: low-rank interconnected adaptation across layers.   Zhong et al. 2024, arXiv 2407.09946 (yibozhong/lily).

Equation:
    y = W x + b + s sum_e p_e B_e A x,   p = mean over all tokens of softmax(R A x),   e = 1 … experts

Layers share factors. All modules with the same name and shape share the matrices B_e [out, rank], and every `stride`
consecutive ones share one A [rank, in]. Each module has a separate router R [experts, rank]. With across="shape", all
modules of the same shape share factors, whatever their names are, as in peft if target_modules is a pattern.

As in the authors' code and in peft, p is also a mean over the batch. So the output of a row depends on the other rows
and on the padding. When a token is generated with a cache, p ignores all earlier tokens. For these reasons rows cannot
be routed, and the adapter cannot be merged. The softmax is computed in float32 or better.

In a convolution, A is a convolution too, and each position counts as a token. In an embedding, A has a column for each
token.

Parameters: experts * rank a site; in addition, rank * in * kernel for every `stride` sites, and experts * rank * out
for each name and shape.

Start: A and R uniform in +-1/sqrt of their number of columns, B_e at zero: the identity.

Differs from the authors' code: No difference is known. The authors' code was not compared; peft was. peft supports
linear layers only.

Use it: `peftcore.apply(model, "lily")`, with a larger rank than LoRA's, where layers have similar functions. Do not use
it if the output of a row must not depend on the rest of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Operator, Shared, Site, Surgeon, Tags


class LilyConfig(MethodConfig):
    """Options of Lily."""

    overridable = ("scale",)

    method: Literal["lily"] = "lily"
    rank: PositiveInt = 32
    """Rank of the update."""
    stride: PositiveInt = 1
    """Number of consecutive modules that share an A."""
    experts: PositiveInt = 2
    """Number of matrices B_e for each name and shape."""
    scale: PositiveFloat = 1.0
    """Factor s of the update."""
    across: Literal["name", "shape"] = "name"
    """The modules that share factors: those of the same name and shape, or all of the same shape."""


class Factor(nn.Module):
    """A factor that sites share. It starts uniform in +-1/sqrt(columns), or at zero."""

    def __init__(self, shape: tuple[int, ...], zero: bool) -> None:
        super().__init__()
        bound = 0.0 if zero else 1 / math.sqrt(math.prod(shape[1:]))
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class LilyOperator(Operator):
    """The router of one site, and references to the shared factors."""

    def __init__(self, site: Site, config: LilyConfig, A: tuple[str, Shared], B: tuple[str, Shared]) -> None:
        super().__init__(site)
        (name, self.A), (other, self.B), self.scale = A, B, config.scale
        self.names = name, other  # of the shared factors
        bound = 1 / math.sqrt(config.rank)
        self.router = nn.Parameter(torch.empty(config.experts, config.rank).uniform_(-bound, bound))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B, router = self.cast(y, self.A.module.weight, self.B.module.weight, self.router)
        low = self.layer.apply(x, A)  # channels: rank
        logits = self.layer.channels_last(self.layer.mix(low, router)).flatten(0, -2)  # [tokens, experts]
        shares = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).mean(0)
        mixed = torch.tensordot(shares.to(y.dtype), B, 1)  # [rank, out]
        return self.layer.add(y, low, mixed.mT, self.scale)


class Lily(Method):
    """Low-rank updates with factors that layers share, and with a separate router for each layer."""

    name = "lily"
    Config = LilyConfig
    tags = Tags(category="reparameterized", paper="2407.09946", per_row=False)
    learning_rate = LearningRate(
        3e-4, "yibozhong/lily@db6ed3c, commonsense-reasoning/finetune_llama.sh", on="Llama 3 8B, Commonsense170K"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: LilyConfig, surgeon: Surgeon) -> None:
        seen: dict[str, int] = {}
        for site in surgeon.sites():
            inputs, out = (site.in_features, *site.kernel), site.out_features
            name = site.path.rpartition(".")[2] if config.across == "name" else "all"
            group = f"{name}_{'x'.join(map(str, (out, *inputs)))}"
            seen[group] = seen.get(group, -1) + 1
            names = f"A_{group}_{seen[group] // config.stride}", f"B_{group}"
            A = surgeon.own(names[0], partial(Factor, (config.rank, *inputs), False))
            B = surgeon.own(names[1], partial(Factor, (config.experts, config.rank, out), True))
            surgeon.graft(site, LilyOperator, config, A=(names[0], A), B=(names[1], B))

    @staticmethod
    def parameter_count(site: Site, config: LilyConfig) -> int:
        return config.experts * config.rank
