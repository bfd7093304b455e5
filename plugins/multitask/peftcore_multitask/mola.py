"""MoLA: low-rank experts, of which higher layers have more.   Gao et al. 2024, arXiv 2402.08562 (GCYZSL/MoLA).

Equation:
    y = W x + b + s sum_{e in top} g_e B_e A_e dropout(x),   g = p / sum_{top} p,   p = softmax(W_r x)
    loss = balance * sum_layers experts * sum_e F_e P_e

s = alpha / rank, and top has the `top_k` largest p. `experts` sets the number of experts of each layer. A list is
spread evenly over the depth: with [2, 4, 6, 8], the first quarter of the layers has two experts and the last quarter
has eight. A_e [rank, in] and W_r [experts, in] are without bias. The softmax is taken in float32 at least, of x without
dropout; each expert has a separate dropout. F_e is the share of expert e in all choices of a layer, and P_e the mean of
p_e, over tokens without padding and the modules of the layer.

The gate depends on the token, so the method cannot be merged. Tensors that the model reads without calling their module
are refused.

Parameters: experts * (rank * (in * kernel + out) + in * kernel) per site, with the experts of its layer.

Start: A_e and W_r uniform in +-1/sqrt(in), B_e at zero. A fresh adapter is the identity.

Differs from the authors' code: The authors gather the tokens of each expert. Here all A are applied in one product, and
each token keeps only the ranks of its experts. So shapes do not depend on values, and no token is dropped. Near a tie,
rounding may choose another expert. The authors count padding in F and P. Their script does not use the loss, so
`balance` is 0 by default; elsewhere they set it to 0.001.

Use it: `peftcore.apply(model, "mola", experts=[8, 6, 4, 2])`, where one size for all layers wastes experts;
`molora_moe` weighs all experts instead of choosing some, and `mixlora` chooses once for a whole feed-forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    AppliedMethod,
    ForwardContext,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
    Tap,
    block_depths,
    full_precision,
    stack_path,
)
from peftcore.errors import UnsupportedSite
from peftcore_multitask._mixture import ExpertsOperator, imbalance, leave_counts, softmax_of


class MoLAConfig(MethodConfig):
    """Options of MoLA."""

    method: Literal["mola"] = "mola"
    experts: PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)] = Field(default=[2, 4, 6, 8])
    """Low-rank updates of a site: one number for all layers, or several that are spread evenly over the depth."""
    top_k: PositiveInt = 2
    """Number of low-rank updates that act on a token."""
    rank: PositiveInt = 8
    """Rank of each low-rank update."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.05
    """Dropout probability of the inputs of each expert."""
    balance: NonNegativeFloat = 0.0
    """Factor of the balancing loss."""

    @model_validator(mode="after")
    def _enough(self) -> Self:
        fewest = self.experts if isinstance(self.experts, int) else min(self.experts)
        if self.top_k > fewest:
            raise ValueError(f"top_k={self.top_k} is more than the fewest experts of a layer, {fewest}")
        return self


@dataclass(frozen=True, eq=False)
class LayerSite(Site):
    """A site, with the number of experts of its layer and the layer's path."""

    experts: int = 1
    block: str = ""
    """The path of the layer; empty if the site is in no layer."""


class MoLAOperator(ExpertsOperator):
    """The experts of one site, and the router that chooses the experts of each token."""

    def __init__(self, site: LayerSite, config: MoLAConfig, balances: Tap) -> None:
        super().__init__(site, site.experts, config.rank, config.alpha / config.rank, config.dropout)
        bound = 1 / math.sqrt(site.in_features * math.prod(site.kernel))
        self.router = nn.Parameter(torch.empty(site.experts, site.in_features, *site.kernel).uniform_(-bound, bound))
        self.top_k, self.balance, self.block, self.balances = config.top_k, config.balance, site.block, balances
        if self.balance:
            self.stackable = False  # the loss is of the rows of one adapter

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        channels, precise = self.layer.channel_dim, torch.promote_types(self.router.dtype, torch.float32)
        with full_precision(x):
            read = x if self.layer.one_hot else x.to(precise)
            probabilities = softmax_of(self, self.layer.apply(read, self.router.to(precise)))
        largest = probabilities.topk(self.top_k, channels)
        weights = largest.values / largest.values.sum(channels, keepdim=True)
        gates = torch.zeros_like(probabilities).scatter(channels, largest.indices, weights)
        self.noted(gates, channels)
        if self.training and self.balance:
            picks = (gates > 0).to(gates.dtype)
            leave_counts(self.balances, self.block, *map(self.layer.channels_last, (picks, probabilities)))
        return self.update(call, x, gates)


class MoLA(Method):
    """Low-rank experts for each token, more of them in higher layers.

    Example:
        injection = peftcore.apply(model, "mola", experts=[8, 6, 4, 2])  # more of them in lower layers
    """

    name = "mola"
    Config = MoLAConfig
    tags = Tags(category="multitask", paper="2402.08562", random=True, routes="token")
    learning_rate = LearningRate(3e-4, "GCYZSL/MoLA@01785c8, mola_training.py", on="Llama 2 7B, ScienceQA")
    target = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: MoLAConfig, surgeon: Surgeon) -> None:
        self.balances = Tap()
        for site in surgeon.sites():
            routed = _in_layer(surgeon, site, config.at(site.path).experts)
            surgeon.graft(routed, MoLAOperator, config, balances=self.balances)

    def output_loss(self, injection: AppliedMethod, output: Any, call: ForwardContext) -> Tensor | None:
        loss, config = imbalance(self.balances), injection.config
        return None if loss is None else config.balance / config.top_k * loss

    @staticmethod
    def parameter_count(site: LayerSite, config: MoLAConfig) -> int:
        inputs = site.in_features * math.prod(site.kernel)
        return site.experts * (config.rank * (inputs + site.out_features) + inputs)


def _in_layer(surgeon: Surgeon, site: Site, experts: int | list[int]) -> LayerSite:
    """Return a site with the number of experts of its layer.

    Raises:
        UnsupportedSite: `experts` is a list, but the site is in no layer.
    """
    depths = block_depths(surgeon)
    block = next((entry.block for entry in surgeon.resolver.host.at(site.module_path) if entry.block), None)
    if isinstance(experts, int):
        return LayerSite(**vars(site), experts=experts, block=block or "")
    if block is None:
        raise UnsupportedSite(
            f"{site.path} belongs to no layer, so experts={experts} has no number for it; set experts to one number, "
            "or exclude it"
        )
    count = sum(stack_path(each) == stack_path(block) for each in depths if each is not None)
    return LayerSite(**vars(site), experts=experts[depths[block] * len(experts) // count], block=block)
