"""Mixture of adapters: bottlenecks after a sub-block, which a gate mixes for each token.

Equation:
    y = h + sum_e g_e (W_up_e f(W_down_e h + b_down_e) + b_up_e),   g = softmax(W_g h)
    loss = balance * experts * sum_e F_e P_e

W_down_e is [r, d], W_up_e [d, r] and W_g [experts, d], without bias; h is the output of attention or feed-forward
before it is added to the residual stream. With `top_k`, only the k experts with the largest gates act on a token, and
these gates are divided by their sum. F_e is the share of e in all choices, and P_e is the mean of its gate before the
choice. Both are over the tokens of one sub-block without padding (Fedus et al. 2022, arXiv 2101.03961). Without
`top_k`, all experts act on all tokens, and the balancing loss is left out.

Gates and losses are in float32 at least.

Parameters: experts * (2 d r + r + d) + experts * d per adapter, two adapters per block.

Start: W_up and all biases at zero, W_down and W_g as torch's layers. A fresh adapter is the identity.

Differs from the authors' code: No single paper describes this method. It is the common form of routed adapters, as a
baseline for them. Gates for whole sequences, computed from the mean of the tokens, are not available.

Use it: `peftcore.apply(model, "moa_adapters", experts=8, top_k=2, balance=0.01)`, where one data set contains several
kinds of data, and each token shows its kind; not where the task is known and calls can pass it (`hyperformer_pp`,
`mtl_lora`), nor where the adapter has to be small: `loramoe` and `molora_moe` are similar, with linear experts.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    ACTIVATIONS,
    OUTPUTS,
    AppliedMethod,
    AtBranchEnd,
    ForwardContext,
    Joins,
    Method,
    MethodConfig,
    Router,
    Site,
    Surgeon,
    Tags,
    Tap,
    branch_end,
    full_precision,
)
from peftcore_multitask._mixture import imbalance, leave_counts


class MoAAdaptersConfig(MethodConfig):
    """Options of a mixture of adapters."""

    method: Literal["moa_adapters"] = "moa_adapters"
    experts: PositiveInt = 4
    """Number of bottlenecks (experts) of a site."""
    bottleneck: PositiveInt = 16
    """Width r of each bottleneck."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """The non-linearity f."""
    top_k: PositiveInt | None = None
    """Number of bottlenecks that act on a token; None: all."""
    balance: NonNegativeFloat = 0.0
    """Factor of the balancing loss."""
    joins: Joins = "stream"
    """Where the adapter reads and adds. "stream": after the host's dropout, layer scale and stochastic depth on a
    branch's output. "matrix": before these operations, at the output of the branch's last matrix."""

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.top_k is not None and self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} is more than the {self.experts} experts")
        if self.balance and self.top_k is None:
            raise ValueError(
                "without top_k all experts act on all tokens, so there is nothing to balance: set top_k, or balance=0"
            )
        return self


class MixtureOperator(AtBranchEnd, Router):
    """The bottlenecks of one site and their gate."""

    def __init__(self, site: Site, config: MoAAdaptersConfig, balances: Tap) -> None:
        super().__init__(site)
        experts, r, d = config.experts, config.bottleneck, site.out_features
        bound = 1 / math.sqrt(d)
        self.gate = nn.Parameter(torch.empty(experts, d).uniform_(-bound, bound))
        self.down = nn.Parameter(torch.empty(experts, r, d).uniform_(-bound, bound))
        self.down_bias = nn.Parameter(torch.zeros(experts, r))
        self.up = nn.Parameter(torch.zeros(experts, d, r))
        self.up_bias = nn.Parameter(torch.zeros(experts, d))
        self.activation, self.top_k = ACTIVATIONS[config.activation](), config.top_k
        self.balance, self.balances, self.place = config.balance, balances, site.path
        self.stackable = not self.balance  # the loss is of the rows of one adapter

    def adapt(self, h: Tensor) -> Tensor:
        x = self.layer.channels_last(h)  # [..., d]
        gates = self.gates(x)
        down, down_bias, up, up_bias, shares = self.cast(h, self.down, self.down_bias, self.up, self.up_bias, gates)
        low = self.activation(x @ down.flatten(0, 1).mT + down_bias.flatten())  # [..., experts * r]
        low = low.unflatten(-1, down_bias.shape) * shares.unsqueeze(-1)
        added = low.flatten(-2) @ up.mT.flatten(0, 1) + shares @ up_bias
        return h + self.layer.channels_back(added)

    def gates(self, x: Tensor) -> Tensor:
        """Return the gates ``[..., experts]`` of tokens ``[..., d]``, in float32 at least."""
        precise = torch.promote_types(self.gate.dtype, torch.float32)
        with full_precision(x):
            probabilities = (x.to(precise) @ self.gate.to(precise).mT).softmax(-1)
        gates = probabilities
        if self.top_k is not None:
            largest = probabilities.topk(self.top_k, -1)
            weights = largest.values / largest.values.sum(-1, keepdim=True)
            gates = torch.zeros_like(probabilities).scatter(-1, largest.indices, weights)
        self.noted(gates)
        if self.training and self.balance:
            leave_counts(self.balances, self.place, (gates > 0).to(gates.dtype), probabilities)
        return gates


class MoAAdapters(Method):
    """Bottleneck adapters after attention and feed-forward, mixed separately for each token.

    Example:
        injection = peftcore.apply(model, "moa_adapters", experts=8, top_k=2, balance=0.01)
    """

    name = "moa_adapters"
    Config = MoAAdaptersConfig
    tags = Tags(category="multitask", paper="none: a form that several have in common", routes="token")
    target = ("attn.output", "mlp.output")
    alternatives = OUTPUTS

    def inject(self, model: nn.Module, config: MoAAdaptersConfig, surgeon: Surgeon) -> None:
        self.balances = Tap()
        for site in surgeon.sites():
            place = branch_end(surgeon, site, config.at(site.path).joins)
            surgeon.graft(place, MixtureOperator, config, place.places, balances=self.balances)

    def output_loss(self, injection: AppliedMethod, output: Any, call: ForwardContext) -> Tensor | None:
        loss, config = imbalance(self.balances), injection.config
        return None if loss is None else config.balance / config.top_k * loss

    @staticmethod
    def parameter_count(site: Site, config: MoAAdaptersConfig) -> int:
        d, r = site.out_features, config.bottleneck
        return config.experts * (2 * d * r + r + 2 * d)
