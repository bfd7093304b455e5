"""LoHa: low-rank Hadamard product.   Hyeon-Woo et al. 2021, arXiv 2108.06098 (FedPara); Yeh et al. 2023, 2309.14859.

Equation:
    W' = W + s (B1 A1) (o) (B2 A2),   s = alpha / rank,   A [rank, in * kernel],   B [out, rank]

The entrywise product of two matrices of rank r has rank up to r^2, for the parameters of a LoRA of rank 2 r. With
`tucker`, the kernel of a convolution is in a third factor T (proposition 3 of FedPara): H[o, i, k] = sum_pq T[p, q, k]
B[o, p] A[q, i] with T [rank, rank, kernel], for each of the two matrices H. Each stacked expert has separate factors.
Dropout is as in LyCORIS and peft: it drops rows of the change (one for each output) or the whole change, in the same
way for the whole batch. Dropped values have zero gradient.

Parameters: 2 rank (in * kernel + out) a site, with `tucker` 2 rank (in + out + rank * kernel), times the number of
experts.

Start: A ~ N(0, 1), B1 and T ~ N(0, 0.1), B2 at zero, as in LyCORIS, whose code defines LoHa: the identity.

Differs from the authors' code: FedPara itself trains from scratch. LyCORIS applies s once in training and twice in a
merge; here it is always applied once. peft starts A2 at zero instead of B2. With factored kernels, the gradient of B in
peft is that of the wrong matrix.

Use it: `peftcore.apply(model, "loha")`, for styles and concepts in diffusion models, at a low rank (2 to 8). For the
same size of a file, its update has a higher rank than that of LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, Held, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore_reparameterized._dropped import ChangeDropout, DropsChange, with_shares


class LoHaConfig(MethodConfig):
    """Options of LoHa."""

    method: Literal["loha"] = "loha"
    rank: PositiveInt = 8
    """Rank of each of the two matrices. The rank of the update is at most its square."""
    alpha: PositiveFloat = 8.0
    """Numerator of the scale ``alpha / rank``."""
    tucker: bool = False
    """Whether kernels of convolutions are factored too (`use_effective_conv2d` in peft). It has no effect on other
    layers."""
    rank_dropout: Share = 0.0
    """Probability that the change is dropped for an output, in training."""
    rank_dropout_scale: bool = False
    """Whether the kept outputs are divided by their share, which peft always does."""
    module_dropout: Share = 0.0
    """Probability that the whole change of a module is dropped, in training."""


class LoHaOperator(DropsChange):
    """The update of one site."""

    padded, scaled = frozenset({"A1", "B1", "T1", "A2", "B2", "T2"}), frozenset({"B1"})

    def __init__(self, site: Site, config: LoHaConfig) -> None:
        super().__init__(site)
        self.scale = config.alpha / config.rank
        self.drops = ChangeDropout(config.rank_dropout, config.module_dropout, config.rank_dropout_scale)
        for name, shape in _shapes(site, config).items():
            std = {"A": 1.0, "B": 0.1, "T": 0.1}[name[0]] * (name != "B2")
            self.register_parameter(name, nn.Parameter(torch.randn(*site.batch, *shape) * std))

    def matrix(self, number: int) -> Tensor:
        """Return one of the two matrices: [*batch, out, in * kernel], or with the kernel's own dimensions."""
        A, B = self.get_tensor(f"A{number}"), self.get_tensor(f"B{number}")
        core = self._parameters.get(f"T{number}")
        return B @ A if core is None else torch.einsum("pq...,op,qi->oi...", core, B, A)

    def prefers_activation_form(self, x: Tensor) -> bool:
        """Whether the update is computed on activations. It is if the factors for all of its ranks are much smaller
        than the weight."""
        (outputs, rank), (_, inputs) = self.get_tensor("B1").shape[-2:], self.get_tensor("A1").shape[-2:]
        return self.layer.of_vectors and 3 * rank**2 * (outputs + inputs) < 2 * outputs * inputs

    def prepare(self, held: Held) -> tuple[Tensor, Tensor]:
        """Return factors of the whole update: A [rank^2, in], the products of each row of A1 with each row of A2, and
        likewise B [out, rank^2]."""
        (A1, B1), (A2, B2) = ((self.get_tensor(f"A{n}"), self.get_tensor(f"B{n}")) for n in (1, 2))
        return (A1[:, None] * A2).flatten(0, 1), (B1[:, :, None] * B2[:, None]).flatten(1)

    def activation_form(self, call: Callable[..., Tensor], x: Tensor, prepared: tuple[Tensor, Tensor]) -> Tensor:
        A, B = prepared
        if self.training and self.drops:
            B = B * self.drops.shares(B.shape[:1], B).unsqueeze(-1)
        return self.layer.update(call, x, A, B, self.scale)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + with_shares(self._change(weight), self.drops, self.layer.batch_dims, self.training)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self._change(weight)

    def _change(self, weight: Tensor) -> Tensor:
        return self.scale * (self.matrix(1) * self.matrix(2)).view(weight.shape)


class LoHa(Method):
    """Low-rank Hadamard product."""

    name = "loha"
    Config = LoHaConfig
    tags = Tags(category="reparameterized", paper="2108.06098", mergeable=True)
    learning_rate = LearningRate(
        5e-4,
        "cyber-meow/LyCORIS-evaluation@7c5758c, exp_configs/training_configs/exp-1011-sd15-loha4a2-a.toml",
        on="Stable Diffusion 1.5",
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: LoHaConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, LoHaOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: LoHaConfig) -> int:
        return math.prod(site.batch) * sum(math.prod(shape) for shape in _shapes(site, config).values())


def _shapes(site: Site, config: LoHaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the trained tensors, for one expert."""
    tucker = config.tucker and math.prod(site.kernel) > 1
    shapes: dict[str, tuple[int, ...]] = {}
    for number in (1, 2):
        shapes[f"A{number}"] = (config.rank, site.in_features * (1 if tucker else math.prod(site.kernel)))
        shapes[f"B{number}"] = (site.out_features, config.rank)
        if tucker:
            shapes[f"T{number}"] = (config.rank, config.rank, *site.kernel)
    return shapes
