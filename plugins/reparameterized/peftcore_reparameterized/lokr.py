"""LoKr: low-rank Kronecker product.   Yeh et al. 2023, arXiv 2309.14859 (LyCORIS).

Equation:
    W' = W + s (w1 (x) w2),   w1 [l, m],   w2 [k, n * kernel] = w2a w2b,   l k = out,   m n = in,   s = alpha / r

w1 scales copies of w2: delta[i k + j, p n + q] = s w1[i, p] w2[j, q]. out and in are split into two parts near their
square root, or at `factor`, with the smaller part first. w2 is a full matrix if r >= max(k, n) / 2, or with
`full_matrix`. w1 is a full matrix too, except with `decompose_both` and r < max(l, m) / 2, where it is a product w1a
w1b. If both are full, s is 1. With `tucker`, the kernel of a convolution is in a third factor of w2, t2 [r, r, kernel].
Each stacked expert has separate factors.

Parameters: l m + r (k + n * kernel) a site if only w1 is full, l m + k n * kernel if both are, times the number of
experts.

Start: w2, or else w2b, at zero; all else uniform in +-1/sqrt(inputs): the identity.

Differs from the authors' code: Everything is as in LyCORIS, which defines the method, except that a merge in LyCORIS
applies s twice. peft has s = alpha / r even if both factors are full, and starts w1 at zero. If `factor` divides a
dimension, peft uses it as the first part even if it is the larger one; the option `factor_first` does the same here.
With a full w2 in one-dimensional convolutions, peft has the values of the product in the order delta[j, i, q, p,
kernel], which the option `layout` selects. KronA (Edalati et al. 2022, arXiv 2212.10650) has neither a rank nor
`factor`.

Use it: `peftcore.apply(model, "lokr")`, for the smallest files of the LyCORIS methods, above all in diffusion models.
The rank of the update is not limited by its number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore_reparameterized._dropped import ChangeDropout, DropsChange, with_shares


class LoKrConfig(MethodConfig):
    """Options of LoKr."""

    method: Literal["lokr"] = "lokr"
    rank: PositiveInt = 8
    """Rank r of those factors that are products of two matrices."""
    alpha: PositiveFloat = 8.0
    """Numerator of the scale ``alpha / rank``; it has no effect if both factors are full."""
    factor: PositiveInt | None = None
    """Size of one part of a split dimension. If it does not divide a dimension, the largest divisor below it is used.
    With None, the largest divisor up to the square root is used."""
    factor_first: bool = False
    """Whether `factor` is the first part of a dimension that it divides even if it is the larger part, as in peft."""
    decompose_both: bool = False
    """Whether w1 is a product too, if the rank is less than half of its larger dimension."""
    full_matrix: bool = False
    """Whether both factors are full matrices."""
    tucker: bool = False
    """Whether kernels of convolutions are factored too (`use_effective_conv2d` in peft). It has no effect on other
    layers."""
    layout: Literal["kronecker", "peft"] = "kronecker"
    """Order of the values of the product, in one-dimensional convolutions with a full w2. It has no effect
    elsewhere."""
    rank_dropout: Share = 0.0
    """Probability that the change is dropped for an output, in training."""
    rank_dropout_scale: bool = False
    """Whether the kept outputs are divided by their share."""
    module_dropout: Share = 0.0
    """Probability that the whole change of a module is dropped, in training."""


class LoKrOperator(DropsChange):
    """The update of one site."""

    def __init__(self, site: Site, config: LoKrConfig) -> None:
        super().__init__(site)
        shapes = _shapes(site, config)
        self.drops = ChangeDropout(config.rank_dropout, config.module_dropout, config.rank_dropout_scale)
        self.scale = 1.0 if shapes.keys() == {"w1", "w2"} else config.alpha / config.rank
        self.mixes_kernel = config.layout == "peft" and len(site.kernel) == 1 and "w2" in shapes
        for name, shape in shapes.items():
            bound = 0.0 if name in ("w2", "w2b") else 1 / math.sqrt(math.prod(shape[1:]))
            self.register_parameter(name, nn.Parameter(torch.empty(*site.batch, *shape).uniform_(-bound, bound)))

    def factor(self, name: str) -> Tensor:
        """Return w1 [*batch, l, m] or w2 [*batch, k, n * kernel]."""
        if name in self._parameters:
            return self.get_tensor(name)
        a, b = self.get_tensor(f"{name}a"), self.get_tensor(f"{name}b")
        core = self._parameters.get("t2") if name == "w2" else None
        return a @ b if core is None else torch.einsum("pq...,po,qi->oi...", core, a, b).flatten(1)

    def prefers_activation_form(self, x: Tensor) -> bool:
        return self.layer.of_vectors

    def activation_form(self, call: Callable[..., Tensor], x: Tensor, prepared: None) -> Tensor:
        y, w1 = call(x), self.factor("w1")
        parts = x.unflatten(-1, (w1.shape[1], -1))  # [..., m, n]: one after the other, w2 acts in each and w1 across
        last: Tensor | None = self._parameters.get("w2")
        if last is None:
            parts, last = F.linear(parts, *self.cast(y, self.get_tensor("w2b"))), self.get_tensor("w2a")
        w1, last = self.cast(y, w1, last)
        mixed = F.linear(parts.mT, w1).mT  # [..., l, n or r]
        if self.training and self.drops:
            change = F.linear(mixed, last).flatten(-2)  # [..., out]
            return y + self.scale * self.drops.shares(change.shape[-1:], change) * change
        return self.layer.add(y.unflatten(-1, (len(w1), -1)), mixed, last, self.scale).flatten(-2)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + with_shares(self._change(weight), self.drops, self.layer.batch_dims, self.training)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self._change(weight)

    def _change(self, weight: Tensor) -> Tensor:
        w1, w2 = self.factor("w1"), self.factor("w2")
        delta = w1[..., :, None, :, None] * w2[..., None, :, None, :]  # [*batch, l, k, m, n * kernel]
        if self.mixes_kernel:
            delta = delta.unflatten(-1, (-1, weight.shape[-1])).transpose(0, 1).transpose(2, 3)  # [k, l, n, m, kernel]
        return self.scale * delta.reshape(weight.shape)


class LoKr(Method):
    """Low-rank Kronecker product."""

    name = "lokr"
    Config = LoKrConfig
    tags = Tags(category="reparameterized", paper="2309.14859", mergeable=True)
    learning_rate = LearningRate(
        5e-4,
        "cyber-meow/LyCORIS-evaluation@7c5758c, exp_configs/training_configs/exp-1021-sd15-lokrf8-a.toml",
        on="Stable Diffusion 1.5",
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: LoKrConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, LoKrOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: LoKrConfig) -> int:
        return math.prod(site.batch) * sum(math.prod(shape) for shape in _shapes(site, config).values())


def _cut(size: int, factor: int | None, first: bool = False) -> tuple[int, int]:
    """Return the two parts of a dimension. The smaller one is first, or, with `first`, `factor` if it divides the
    dimension."""
    if factor is not None and size % factor == 0:
        other = size // factor
        return (factor, other) if first else (min(factor, other), max(factor, other))
    small = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0 and n <= (factor or size))
    return small, size // small


def _shapes(site: Site, config: LoKrConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the trained tensors, for one expert."""
    sizes = (site.out_features, site.in_features)
    (low_out, out), (low_in, inputs) = (_cut(size, config.factor, config.factor_first) for size in sizes)
    rank, kernel = config.rank, math.prod(site.kernel)
    shapes: dict[str, tuple[int, ...]] = {"w1": (low_out, low_in)}
    if config.decompose_both and rank < max(low_out, low_in) / 2 and not config.full_matrix:
        shapes = {"w1a": (low_out, rank), "w1b": (rank, low_in)}
    if rank >= max(out, inputs) / 2 or config.full_matrix:
        return shapes | {"w2": (out, inputs * kernel)}
    if config.tucker and kernel > 1:
        return shapes | {"w2a": (rank, out), "w2b": (rank, inputs), "t2": (rank, rank, *site.kernel)}
    return shapes | {"w2a": (out, rank), "w2b": (rank, inputs * kernel)}
