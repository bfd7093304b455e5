"""PEANuT: weight-aware neural tweakers.   Zhong et al. 2024, arXiv 2410.01870 (yibozhong/peanut, formerly NEAT).

Equation:
    W' = W + s B h_2n,   h_0 = f(A W),   A [rank, out],   B [out, rank]
    h_i = f(E_i h_(i-1)),   h_(n+i) = f(D_i h_(n+i-1)) + h_(n-i),   i = 1 … n = depth,   E_i, D_i [rank, rank]

The update is the output of a small network that is applied to the columns of the frozen weight. Because of f
(`activation`), it is not just a low-rank matrix times W. As in peft, h has neither a scale nor dropout.

Kernels of convolutions count as columns, [out, in * kernel], embeddings are [dim, num], and each expert has a separate
network.

Parameters: 2 * rank * out + 2 * depth * rank^2 a site, times the number of experts.

Start: A uniform in +-1/sqrt(out), E_i and D_i in +-1/sqrt(rank), B at zero: the identity.

Differs from the authors' code: It was compared with peft, without a difference, and not with the authors' code. peft
supports linear layers only.

Use it: `peftcore.apply(model, "peanut")`, where the rank of LoRA limits the quality. Until the adapter is merged, each
forward reads the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    ACTIVATIONS,
    MATRICES,
    Held,
    LearningRate,
    Method,
    MethodConfig,
    Site,
    Surgeon,
    Tags,
    WeightOperator,
)

Activation = Literal["relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"]
"""Names of the function f."""


class PEANuTConfig(MethodConfig):
    """Options of PEANuT."""

    method: Literal["peanut"] = "peanut"
    rank: PositiveInt = 32
    """Width of the network."""
    depth: NonNegativeInt = 0
    """Number of layers on either side, besides A and B."""
    activation: Activation = "relu"
    """The function f."""
    scale: PositiveFloat = 1.0
    """Factor s of the update."""


class PEANuTOperator(WeightOperator):
    """The network of one site."""

    def __init__(self, site: Site, config: PEANuTConfig) -> None:
        super().__init__(site)
        self.scale, self.depth, self.act = config.scale, config.depth, ACTIVATIONS[config.activation]()
        self.inputs = (site.in_features, *site.kernel)
        out, rank = site.out_features, config.rank

        def uniform(*shape: int) -> nn.Parameter:
            bound = 1 / math.sqrt(shape[-1])
            return nn.Parameter(torch.empty(*site.batch, *shape).uniform_(-bound, bound))

        self.A = uniform(rank, out)
        if config.depth:
            self.E, self.D = uniform(config.depth, rank, rank), uniform(config.depth, rank, rank)
        self.B = nn.Parameter(torch.zeros(*site.batch, out, rank))

    def answer(self, weight: Tensor) -> Tensor:
        """Return h_2n [*batch, rank, in * kernel] for a weight [*batch, out, in, *kernel]."""
        matrix = weight.flatten(self.layer.batch_dims + 1)
        h = self.act(self.A @ matrix.to(self.A))
        before = []
        for i in range(self.depth):
            before.append(h)
            h = self.act(self.E[..., i, :, :] @ h)
        for i in range(self.depth):
            h = self.act(self.D[..., i, :, :] @ h) + before[-1 - i]
        return h

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.scale * self.B @ self.answer(weight)).view(weight.shape)

    def prefers_activation_form(self, x: Tensor) -> bool:
        return self.layer.of_vectors

    def prepare(self, held: Held) -> Tensor:
        return self.answer(held.weight)

    def activation_form(self, call: Callable[..., Tensor], x: Tensor, prepared: Tensor) -> Tensor:
        return self.layer.update(call, x, prepared.unflatten(-1, self.inputs), self.B, self.scale, 0.0)


class PEANuT(Method):
    """Updates that a small network computes from the weight."""

    name = "peanut"
    Config = PEANuTConfig
    tags = Tags(category="reparameterized", paper="2410.01870", mergeable=True)
    learning_rate = LearningRate(
        3e-4, "yibozhong/peanut@5b2b2d7, commonsense&math/scripts/finetune.sh", on="Llama 2 7B, Commonsense170K"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: PEANuTConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, PEANuTOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: PEANuTConfig) -> int:
        return math.prod(site.batch) * 2 * config.rank * (site.out_features + config.depth * config.rank)
