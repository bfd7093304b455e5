"""Compacter: adapters of sums of Kronecker products.   Karimi Mahabadi et al. 2021, arXiv 2106.04647.

Equation:
    y = h + (f(h H_down + b_down) H_up + b_up),   H = sum_i R_i (x) (S_i T_i),   i = 1..n   ((x): Kronecker product)

R_i [n, n] are the rules. All matrices of all adapters share one set of rules, while each matrix has separate S_i [in /
n, q] and T_i [q, out / n], with rank q = 1. h is the output of the last matrix of a sub-block, so the host's dropout
acts on the adapter's output too, as in the authors' code. Self-attention and feed-forward are adapted, but not
cross-attention, as in the authors' code; to adapt it, name its matrix as a target. Compacter++ adapts only the
feed-forward. All norms train too, as in the authors' code.

A PHM adapter, the paper's intermediate step towards Compacter, is ``shared_rule=False, factorized=False,
rule_std=0.01``: each matrix has separate rules, and full blocks [in / n, out / n] instead of S_i T_i. A low-rank
adapter, the paper's baseline, is ``rules=False, phm_dim=1``: H = S T (`low_rank_adapter`).

Parameters: 2 q (d + r) + r + d an adapter, and n^3 once for the shared rules. A PHM adapter has 2 d r / n + 2 n^3 + r +
d. Without rules the n^3 are left out. The trained norms are added.

Start: Rules from N(0, 1e-4), S and T from Glorot's uniform draw with gain sqrt(2), as in the authors' code. This is
nearly an identity; ``rule_std=0`` makes it exact.

Differs from the authors' code: No difference is known (rabeehk/compacter). The adapters package adapts the output after
dropout (here joins="stream") and draws S and T from a normal distribution.

Use it: `peftcore.apply(model, "compacter")`, where adapters must be small; they have a tenth of a percent of the
parameters of T5.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    ACTIVATIONS,
    OUTPUTS,
    AtBranchEnd,
    Joins,
    LearningRate,
    Method,
    MethodConfig,
    Shared,
    Site,
    Surgeon,
    Tags,
    branch_end,
)
from peftcore.errors import UnsupportedSite


class CompacterConfig(MethodConfig):
    """Options of Compacter."""

    method: Literal["compacter"] = "compacter"
    bottleneck: PositiveInt = 24
    """Width r of the bottleneck, a multiple of `phm_dim`; in the paper it is a 32nd of the stream's width."""
    phm_dim: PositiveInt = 4
    """Number n of Kronecker products in each matrix; it must divide the width of the stream."""
    rank: PositiveInt = 1
    """Rank q of the second factors, if they are factorized."""
    placement: Literal["compacter", "compacter_pp"] = "compacter"
    """The adapted branches: self-attention and feed-forward, or only the feed-forward (Compacter++)."""
    rules: bool = True
    """Use the rules as first factors; without rules, which requires ``phm_dim=1``, each matrix is one low-rank
    product."""
    shared_rule: bool = True
    """Share one set of rules between all matrices; False gives each matrix separate rules."""
    factorized: bool = True
    """Make the second factors of low rank; False uses full matrices."""
    rule_std: NonNegativeFloat = 1e-4
    """Standard deviation of the rules at the start; 0 makes a fresh adapter an exact identity."""
    activation: Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"] = "gelu_tanh"
    """The non-linearity f."""
    joins: Joins = "matrix"
    """Where the adapter reads and adds: at a branch's last matrix ("matrix"), or after the host's dropout, layer scale
    and stochastic depth on the branch's output ("stream")."""
    train_layer_norm: bool = True
    """Train the norms of the host too, as the paper does."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.bottleneck % self.phm_dim:
            raise ValueError(f"bottleneck={self.bottleneck} is not a multiple of phm_dim={self.phm_dim}")
        if not self.rules and self.phm_dim > 1:
            raise ValueError("rules=False makes each matrix one product; set phm_dim=1 with it")
        return self


class Rule(nn.Module):
    """The rules: the first factors of all products, [n, n, n]."""

    def __init__(self, config: CompacterConfig) -> None:
        super().__init__()
        n = config.phm_dim
        self.value = nn.Parameter(torch.randn(n, n, n) * config.rule_std)


class KroneckerLinear(nn.Module):
    """x H + b, where H is a sum of Kronecker products."""

    def __init__(self, inputs: int, outputs: int, config: CompacterConfig, shared: Shared | None) -> None:
        super().__init__()
        n, self.shared = config.phm_dim, shared
        self.rule = Rule(config) if config.rules and shared is None else None
        width = config.rank if config.factorized else outputs // n
        self.left = nn.Parameter(torch.empty(n, inputs // n, width))  # S, or the whole blocks
        self.right = nn.Parameter(torch.empty(n, width, outputs // n)) if config.factorized else None
        self.bias = nn.Parameter(torch.zeros(outputs))
        for factors in (self.left, self.right):
            for factor in () if factors is None else factors.detach():  # each product is a matrix of its own
                nn.init.xavier_uniform_(factor, gain=math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        rule = self.rule if self.shared is None else self.shared.module
        blocks = self.left if self.right is None else self.left @ self.right
        products = blocks if rule is None else torch.einsum("iab,icd->acbd", rule.value, blocks)
        H = products.reshape(-1, self.bias.shape[0])  # [in, out]
        return nn.functional.linear(x, H.T.to(x.dtype), self.bias.to(x.dtype))


class CompacterOperator(AtBranchEnd):
    """Adds the adapter to the output of a branch. If the output is a tuple, it changes the first entry."""

    stackable = True

    def __init__(self, site: Site, config: CompacterConfig, rule: Shared | None) -> None:
        super().__init__(site)
        if site.out_features % (n := config.phm_dim):
            raise UnsupportedSite(
                f"{site.path}: its {site.out_features} features are not a multiple of phm_dim={n}; set another "
                "phm_dim, or exclude it"
            )
        self.down = KroneckerLinear(site.out_features, config.bottleneck, config, rule)
        self.activation = ACTIVATIONS[config.activation]()
        self.up = KroneckerLinear(config.bottleneck, site.out_features, config, rule)

    def adapt(self, h: Tensor) -> Tensor:
        return h + self.layer.channels_back(self.up(self.activation(self.down(self.layer.channels_last(h)))))


class Compacter(Method):
    """Bottleneck adapters of Kronecker products with shared rules."""

    name = "compacter"
    Config = CompacterConfig
    tags = Tags(category="additive", paper="2106.04647", identity_at_init=False, identity_options={"rule_std": 0.0})
    learning_rate = LearningRate(3e-3, "rabeehk/compacter@e123daa, seq2seq/configs/compacter.json", on="T5-base, GLUE")
    target = ("attn.output", "mlp.output")
    alternatives = OUTPUTS

    def inject(self, model: nn.Module, config: CompacterConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            own = config.at(site.path)
            families = {entry.role.partition(".")[0] for entry in surgeon.resolver.host.at(site.module_path)}
            left_out = {"cross", "attn"} if own.placement == "compacter_pp" else {"cross"}
            if site.role == "attn.output" and families & left_out:  # named by the role, not by the user
                continue
            rule = surgeon.own(f"rule_{own.phm_dim}", partial(Rule, own)) if own.rules and own.shared_rule else None
            place = branch_end(surgeon, site, own.joins)
            surgeon.graft(place, CompacterOperator, config, place.places, rule=rule)
        for site in surgeon.at("norm.*") if config.train_layer_norm else ():
            surgeon.train(site.module_path)

    @staticmethod
    def parameter_count(site: Site, config: CompacterConfig) -> int:
        if site.form == "weight":  # a norm's gain or bias
            return site.numel
        d, r, n = site.out_features, config.bottleneck, config.phm_dim
        factors = 2 * config.rank * (d + r) if config.factorized else 2 * d * r // n
        return factors + r + d + (2 * n**3 if config.rules and not config.shared_rule else 0)
