"""HRA: Householder reflection adaptation.   Yuan et al. 2024, arXiv 2405.17484.

Equation:
    W' = W H_1 H_2 ... H_r,   H_i = I - 2 u_i u_i^T / ||u_i||^2

The reflections act on the inputs of a weight, as in peft and the authors' code for diffusion and DeBERTa; in
convolutions on the whole kernel of an output, in embeddings on the vector that is returned. Their product is computed
in one step, as I - N^T T N with T [r, r] triangular, so no matrix [in, in] is needed. A u of zeros reflects nothing.

`orthogonality` is the weight of an additional loss: the sum over the sites of ||I - N N^T||, where the rows of N are
u_i / ||u_i||. With `gram_schmidt` the u_i are made orthonormal, W' = W (I - 2 Q Q^T). These are r reflections across
different directions, which are never the identity.

Parameters: rank * in * kernel a site, times the number of experts.

Start: Pairs u_1 = u_2, u_3 = u_4 and so on, uniform in +-1/sqrt(r / 2), so that W' = W: the identity. With
`gram_schmidt` they start unpaired.

Differs from the authors' code: With `gram_schmidt`, the authors and peft also start with pairs. Orthogonalizing a pair
normalizes rounding errors, so the initial outputs depend on the machine, and may be NaN. The authors' code for Llama
reflects the outputs. peft also accepts an odd rank, with which a fresh adapter is not the identity. Its convolutions
are correct only for square kernels without dilation or groups.

Use it: `peftcore.apply(model, "hra")`, for the same tasks as OFT. The cost increases with the rank, not with the size
of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    AppliedMethod,
    Held,
    LearningRate,
    Method,
    MethodConfig,
    Site,
    Surgeon,
    Tags,
    WeightOperator,
)
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._rotations import rows, weight_of, width


class HRAConfig(MethodConfig):
    """Options of HRA."""

    method: Literal["hra"] = "hra"
    rank: Annotated[int, Field(ge=2, multiple_of=2)] = 8
    """Number of reflections: even, since they start in pairs."""
    orthogonality: NonNegativeFloat = 0.0
    """Weight of the loss that makes the reflections orthogonal."""
    gram_schmidt: bool = False
    """Reflect across orthonormal directions; a fresh adapter then changes outputs."""


class HRAOperator(WeightOperator):
    """The reflections of one site."""

    stackable = True

    changes_inputs = True

    def __init__(self, site: Site, config: HRAConfig) -> None:
        super().__init__(site)
        self.gram_schmidt = config.gram_schmidt
        if self.gram_schmidt and config.rank > width(site):
            raise UnsupportedSite(
                f"{site.path} has {width(site)} inputs, too few for {config.rank} orthogonal directions; lower the rank"
            )
        drawn = config.rank if self.gram_schmidt else config.rank // 2
        bound = 1 / math.sqrt(config.rank / 2)
        u = torch.empty(*site.batch, drawn, width(site)).uniform_(-bound, bound)
        self.U = nn.Parameter(u.repeat_interleave(config.rank // drawn, dim=-2))

    def directions(self) -> Tensor:
        """Return the vectors u_i, normalized to length one: [*batch, rank, in]."""
        U = self.U.to(torch.promote_types(self.U.dtype, torch.float32))
        norm = torch.linalg.vector_norm(U, dim=-1, keepdim=True)
        return U / torch.where(norm == 0, 1.0, norm)

    def factors_of(self, base: Tensor) -> tuple[Tensor, Tensor]:
        """Return M = base N^T T [*batch, n, rank] and N, where `base` are the rows of a weight [*batch, n, in]. The
        update is -M N."""
        N = self.directions()
        if self.gram_schmidt:
            N = torch.linalg.qr(N.mT).Q.mT
            return 2 * (base @ N.mT.to(base.dtype)), N
        half = torch.eye(N.shape[-2], dtype=N.dtype, device=N.device) / 2
        inverse = half + (N @ N.mT).triu(1)  # of T
        along = (base @ N.mT.to(base.dtype)).to(N.dtype)
        return torch.linalg.solve_triangular(inverse, along, upper=True, left=False), N

    def prefers_activation_form(self, x: Tensor) -> bool:
        return self.layer.of_vectors

    def prepare(self, held: Held) -> tuple[Tensor, Tensor]:
        return self.factors_of(held.weight)

    def activation_form(self, call: Callable[..., Tensor], x: Tensor, prepared: tuple[Tensor, Tensor]) -> Tensor:
        M, N = prepared
        return self.layer.update(call, x, N, M, -1.0)

    def forward(self, weight: Tensor) -> Tensor:
        base = rows(weight, self.layer)
        M, N = self.factors_of(base.to(torch.promote_types(base.dtype, self.U.dtype)))
        return weight_of(base - M @ N, self.layer, weight.shape)

    def distance(self) -> Tensor:
        """Return how far the directions are from orthogonal, for each expert: [*batch]."""
        N = self.directions()
        return torch.linalg.matrix_norm(torch.eye(N.shape[-2]).to(N) - N @ N.mT)


class HRA(Method):
    """Householder reflection adaptation."""

    name = "hra"
    Config = HRAConfig
    tags = Tags(category="reparameterized", paper="2405.17484", mergeable=True)
    learning_rate = LearningRate(
        9e-4, "DaShenZi721/HRA@8e0c637, nlu/experiments/glue/mnli.sh", on="DeBERTa-v3-base, MNLI"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: HRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, HRAOperator, config)

    def aux_loss(self, injection: AppliedMethod) -> Tensor | None:
        weight = injection.config.orthogonality
        operators = [each for each in injection.operators.values() if isinstance(each, HRAOperator)]
        return weight * torch.cat([each.distance().flatten() for each in operators]).sum() if weight else None

    @staticmethod
    def parameter_count(site: Site, config: HRAConfig) -> int:
        return math.prod(site.batch) * config.rank * width(site)
