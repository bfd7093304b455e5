"""LiDB: Lightweight DreamBooth, the adapter of HyperDreamBooth.   Ruiz et al. 2023, arXiv 2307.06949.

Equation:
    y = W x + b + s (B_aux B) (A A_aux) x
    A [rank, a],   B [b, rank] trained,   A_aux [a, in] and B_aux [out, b] frozen

The method is LoRA with factors in frozen random bases of low dimension: the rows of A_aux and the columns of B_aux are
orthonormal, and span a of the `in` input directions and b of the `out` output directions. The number of trained values
does not grow with the layer. Each site has separate bases, which are drawn from `basis_seed` and the site's number.
Files contain the bases only with `store_basis`. Otherwise the bases are drawn again when an adapter is loaded, in
float64 on the CPU, with fixed signs so that the result is unique. If a layer has fewer than a inputs or b outputs, that
basis is complete. The rank is at most the size of the smaller basis. In convolutions A_aux is [a, in, *kernel]; each
expert has separate bases. In memory the bases of a site are a * in + b * out numbers: 60 MB in the UNet of Stable
Diffusion 1.5.

The scale s is 1, or alpha / rank if `alpha` is set.

Parameters: rank * (a + b) a site, times the number of experts: 19,200 in the UNet of Stable Diffusion 1.5, and 7,200 in
its text encoder, together 106 kB.

Start: A ~ N(0, 2 / (a + rank)), B at zero: the identity.

Differs from the authors' code: The authors published no code. The equation is the paper's; the start and the order of
the factors follow an unofficial implementation, MFaceTech/HyperDreamBooth, which uses a = 160 and b = 80. In another
unofficial implementation, KohakuBlueleaf/HyperKohaku, the bases are not orthonormal, but drawn from a normal
distribution. The paper's network that predicts A and B of all sites from a picture of a face is not implemented; it is
trained with thousands of adapters. The relaxed rank of the paper's last stage is not an option: there the update is
added to the weights, and a LoRA of a higher rank trains for 40 steps. To do that, call ``injection.bake()`` and apply
`lora` with rank 4, or freeze this adapter with ``injection.trainable(False)`` and apply `lora` in addition.

Use it: `peftcore.apply(model, "lidb")`, where an adapter must be tiny, for example if there is one for each of many
faces, or if a network predicts it. To learn a style, `locon` is better; for an adapter of this size in a language
model, use `vera` or `lora_xs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags


class LiDBConfig(MethodConfig):
    """Options of LiDB."""

    method: Literal["lidb"] = "lidb"
    rank: PositiveInt = 1
    """Rank of the update; at most the size of the smaller basis."""
    alpha: PositiveFloat | None = None
    """Numerator of the scale ``alpha / rank``; None leaves the update unscaled."""
    a: PositiveInt = 100
    """Number a of input directions that an update can read, limited by the number of inputs."""
    b: PositiveInt = 50
    """Number b of output directions that an update can change, limited by the number of outputs."""
    basis_seed: NonNegativeInt = 0
    """Seed of the bases of the first site; each following site adds one."""
    store_basis: bool = False
    """Store the bases in files, which makes files many times larger."""


def sizes(site: Site, config: LiDBConfig) -> tuple[int, int, int]:
    """Return rank, a and b at a site, limited by the site's sizes."""
    a = min(config.a, site.in_features * math.prod(site.kernel))
    b = min(config.b, site.out_features)
    return min(config.rank, a, b), a, b


def orthonormal(generator: torch.Generator, *shape: int) -> Tensor:
    """Return a random matrix with orthonormal columns, ``[*batch, rows, columns]``. During planning it does not have
    values."""
    Q, R = torch.linalg.qr(torch.empty(shape, dtype=torch.float64).normal_(generator=generator))
    signs = 1 - 2 * (R.diagonal(dim1=-2, dim2=-1) < 0).to(Q)  # with which there is one solution alone
    return (Q * signs.unsqueeze(-2)).float()


class LiDBOperator(Operator):
    """The low-rank update of one site, in its two frozen bases."""

    stackable = True
    A_aux: Tensor
    B_aux: Tensor

    def __init__(self, site: Site, config: LiDBConfig, number: int) -> None:
        super().__init__(site)
        rank, a, b = sizes(site, config)
        self.scale = 1.0 if config.alpha is None else config.alpha / config.rank
        inputs = (site.in_features, *site.kernel)
        generator = torch.Generator().manual_seed(config.basis_seed + number)
        A_aux = orthonormal(generator, *site.batch, math.prod(inputs), a).mT.unflatten(-1, inputs)
        self.register_buffer("A_aux", A_aux.contiguous(), persistent=config.store_basis)  # [*batch, a, in, *kernel]
        B_aux = orthonormal(generator, *site.batch, site.out_features, b)
        self.register_buffer("B_aux", B_aux.contiguous(), persistent=config.store_basis)  # [*batch, out, b]
        self.A = nn.Parameter(torch.randn(*site.batch, rank, a) * math.sqrt(2 / (a + rank)))
        self.B = nn.Parameter(torch.zeros(*site.batch, b, rank))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return the factors of LoRA, ``[*batch, rank, in, *kernel]`` and ``[*batch, out, rank]``, and the scale."""
        columns = self.A_aux.flatten(self.A.dim() - 1).to(self.A)
        A = (self.A @ columns).unflatten(-1, self.A_aux.shape[self.A.dim() - 1 :])
        return A, self.B_aux.to(self.B) @ self.B, self.scale

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return self.layer.update(call, x, *self.factors())

    def merged(self, weight: Tensor) -> Tensor:
        A, B, scale = self.factors()
        return weight + scale * (B @ A.flatten(B.dim() - 1)).view(weight.shape)


class LiDB(Method):
    """Low-rank adaptation in random bases."""

    name = "lidb"
    Config = LiDBConfig
    tags = Tags(category="diffusion", paper="2307.06949", mergeable=True, low_rank=True)
    learning_rate = LearningRate(
        1e-3,
        "MFaceTech/HyperDreamBooth@25a4312, train_dreambooth_light_lora.sh",
        on="Realistic Vision 4.0, one face; not the authors' code",
    )
    target = ("attn.q", "attn.k", "attn.v", "attn.out", "cross.q", "cross.k", "cross.v", "cross.out")
    alternatives = MATRICES
    config_version = 2
    former_defaults = ({"alpha": 1.0},)

    def inject(self, model: nn.Module, config: LiDBConfig, surgeon: Surgeon) -> None:
        for number, site in enumerate(surgeon.sites()):
            surgeon.graft(site, LiDBOperator, config, number=number)

    @staticmethod
    def parameter_count(site: Site, config: LiDBConfig) -> int:
        rank, a, b = sizes(site, config)
        return math.prod(site.batch) * rank * (a + b)
