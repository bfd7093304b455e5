"""GLoRA: generalized LoRA.   Chavan et al. 2023, arXiv 2306.07967 (code: Arnav0400/ViT-Slim, GLoRA/layer.py).

Equation:
    W' = W + W * A + B,   b' = b + b * D + E + W C      (*: entry by entry)

A and B have the shape of W, C that of a row of W, D and E that of b. For each, choose low rank (X_d X_u), a vector (for
A and B: one number for each output), a constant, or none. In convolutions an input is a channel at one position of the
kernel.

A layer without a bias gets one from E and W C (D has no effect there and is left out). For modules that cannot have a
bias (an embedding, a stack of experts) only A and B are used. With A="product" the weight is multiplied by a matrix of
its inputs, W' = W + W A + B, as the paper writes it and LyCORIS computes it; the matrix is the same for all positions
of a kernel.

Parameters: of low rank r, r (in * kernel + out) for A and for B, 2 r in for a product, r (in * kernel + 1) for C;
vectors have out or, for C, in * kernel; constants one. Times the number of experts.

Start: X_d at zero, X_u from Glorot's uniform draw, all other terms at zero, so W' = W. A fresh adapter is the identity.

Differs from the authors' code: The authors train all choices at once, with a randomly drawn path for each forward, and
then search for the best path under a budget. Here, as in peft, the choice is fixed; set the result of such a search for
each site in `overrides`. peft starts X_u from Kaiming's draw, and does not add a bias to a layer without one.

Use it: `peftcore.apply(model, "glora")`, where LoRA's update is not expressive enough: GLoRA also scales the weight and
shifts the output, and can be merged too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Site, Surgeon, Tags, WeightOperator, bias_name
from peftcore.errors import UnsupportedSite

Matrix = Literal["lora", "vector", "constant", "none"]
Vector = Literal["vector", "constant", "none"]


class GLoRAConfig(MethodConfig):
    """Options of GLoRA."""

    method: Literal["glora"] = "glora"
    rank: PositiveInt = 8
    """Rank of the low-rank terms; the authors use 4."""
    A: Matrix | Literal["product"] = "lora"
    """The term that scales the weight entry by entry; "product" instead multiplies the weight from the right by a
    low-rank matrix."""
    B: Matrix = "lora"
    """The term that is added to the weight."""
    C: Literal["lora", "vector", "none"] = "lora"
    """The constant input C, which the weight maps to a shift of the bias."""
    D: Vector = "constant"
    """The term that scales the bias."""
    E: Vector = "constant"
    """The term that is added to the bias."""


def terms(site: Site, config: GLoRAConfig) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return the shapes of the tensors of each term that acts at a site (two factors, or the term itself), without the
    dimension of experts."""
    inputs, outputs, rank = site.in_features * math.prod(site.kernel), site.out_features, config.rank
    of_rows = {"lora": ((outputs, rank), (rank, inputs)), "vector": ((outputs, 1),), "constant": ((1, 1),)}
    of_A = of_rows | {"product": ((site.in_features, rank), (rank, site.in_features))}
    of_inputs = {"lora": ((inputs, rank), (rank, 1)), "vector": ((inputs, 1),)}
    found = {"A": of_A.get(config.A), "B": of_rows.get(config.B)}
    bias = bias_name(site.tensor)
    if bias in site.tensors():
        found |= {"C": of_inputs.get(config.C), "E": of_rows.get(config.E)}
        if not site.missing(bias):
            found["D"] = of_rows.get(config.D)
    return {name: each for name, each in found.items() if each}


class GLoRAOperator(WeightOperator):
    """The terms of one site, as matrices. Terms of the weight broadcast to [*batch, out, in * kernel], terms of the
    bias to a column."""

    def __init__(self, site: Site, config: GLoRAConfig) -> None:
        super().__init__(site)
        shapes = terms(site, config)
        if not shapes:
            raise UnsupportedSite(
                f"{site.path}: with these options no parameter is left to train; choose another A or B"
            )
        self.multiplies = config.A == "product"
        self.bias_shape = (*site.batch, site.out_features)
        for name, (first, *second) in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(*site.batch, *first)))
            for shape in second:
                bound = math.sqrt(6 / sum(shape))
                drawn = torch.empty(*site.batch, *shape).uniform_(-bound, bound)
                self.register_parameter(f"{name}_up", nn.Parameter(drawn))

    def has_factors(self, name: str) -> bool:
        """True if a term is of low rank, so that it has two factors."""
        return f"{name}_up" in self._parameters

    def _term(self, name: str) -> Tensor | None:
        value, up = self._parameters.get(name), self._parameters.get(f"{name}_up")
        return value if value is None or up is None else value @ up

    def forward(self, weight: Tensor) -> Tensor:
        B = self._term("B")
        flat = weight.flatten(self.layer.batch_dims + 1)  # [*batch, out, in * kernel]
        scaled = flat + self._multiplied(weight) if self.multiplies else self._scaled(flat)
        return (scaled if B is None else scaled + B).view(weight.shape)

    def _scaled(self, flat: Tensor) -> Tensor:
        A = self._term("A")
        return flat if A is None else flat + flat * A

    def _multiplied(self, weight: Tensor) -> Tensor:
        """Return W A, computed for each position of a kernel, [*batch, out, in * kernel]."""
        A, up, inputs = self.get_parameter("A"), self.get_parameter("A_up"), self.layer.batch_dims + 1
        precise = torch.promote_types(weight.dtype, A.dtype)
        product = weight.movedim(inputs, -1).to(precise) @ A.to(precise) @ up.to(precise)
        return product.movedim(-1, inputs).flatten(inputs)

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        C, D, E = self._term("C"), self._term("D"), self._term("E")
        for addend in (
            None if D is None or bias is None else bias * D.squeeze(-1),
            None if E is None else E.squeeze(-1).expand(self.bias_shape),
            None if C is None else self._mapped(C, weight()),
        ):
            if addend is not None:
                bias = addend.clone() if bias is None else bias + addend
        return bias

    def _mapped(self, C: Tensor, weight: Tensor) -> Tensor:
        precise = torch.promote_types(weight.dtype, C.dtype)
        flat = weight.flatten(self.layer.batch_dims + 1)  # [*batch, out, in * kernel]
        return (flat.to(precise) @ C.to(precise)).squeeze(-1)


class GLoRA(Method):
    """LoRA, scales and shifts of a layer's weight and bias."""

    name = "glora"
    Config = GLoRAConfig
    tags = Tags(category="hybrid", paper="2306.07967", mergeable=True)
    learning_rate = LearningRate(1e-4, "Arnav0400/ViT-Slim@0fed674, GLoRA/README.md", on="ViT-B/16, VTAB-1k")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: GLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, GLoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: GLoRAConfig) -> int:
        return math.prod(site.batch) * sum(math.prod(shape) for each in terms(site, config).values() for shape in each)
