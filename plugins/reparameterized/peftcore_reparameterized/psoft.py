"""PSOFT: orthogonal fine-tuning of the principal subspace.   Wu et al. 2025, arXiv 2505.11235 (fei407/PSOFT).

Equation:
    W = U S V',   B = U_r S_r,   A = V_r'       of the r largest singular values, frozen
    W' = W + B (diag(b) R diag(a) - I) A,   R = (I + K) (I - K)^-1,   K skew-symmetric [r, r]

The principal part of the weight is rotated within its own directions. While a and b are one, the lengths of its columns
and the angles between them are unchanged. a and b [r] relax that; scale_inputs=False removes a, and scale_outputs=False
removes b. The entries above the diagonal of K are trained. With orthogonal=False, R is any matrix. With `series`, R is
I + 2 K + 2 K^2 + … + K^(series - 1), where `eps`, if set, limits the norm of K. With singular_values="both", A and B
each contain the root of S_r, as in PiSSA.

The update is not scaled. R depends on A and B, and a decomposition on another machine would give different factors, at
least in their signs. So A and B are saved in the adapter's file. They are exact unless `iterations` is set. Kernels
count as inputs (in * kernel), embeddings as [dim, num], and each expert is decomposed separately.

Parameters: rank (rank - 1) / 2 + 2 rank a site, times the number of experts; rank at most that of the weight.

Start: K at zero, a and b at one: the identity.

Differs from the authors' code: The authors train the entries below the diagonal of K, with the opposite sign. The
series of the authors has 5 powers, and that of peft 4. peft has a scale alpha / rank, but first divides B by it. Files
of peft lack A and B.

Use it: `peftcore.apply(model, "psoft")`, instead of OFT where memory is scarce. A training step needs no tensors larger
than the factors of a LoRA.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore_reparameterized._decomposed import as_matrix, as_rows, principal, rank_within
from peftcore_reparameterized._kernels import cayley, neumann
from peftcore_reparameterized._low_rank import LowRankOperator
from peftcore_reparameterized._rotations import precise


class PSOFTConfig(MethodConfig):
    """Options of PSOFT."""

    method: Literal["psoft"] = "psoft"
    rank: PositiveInt = 32
    """Number of principal directions that are rotated; at most that of the weight."""
    orthogonal: bool = True
    """Whether R is a rotation. If False, R is any matrix."""
    scale_outputs: bool = True
    """Whether b trains, which scales each direction after R."""
    scale_inputs: bool = True
    """Whether a trains, which scales each direction before R."""
    singular_values: Literal["outputs", "both"] = "outputs"
    """The factor with the singular values: B, or both A and B with their square roots."""
    series: Annotated[int, Field(ge=4, le=100)] | None = None
    """Number of terms of a Neumann series that replaces the exact transform. With None the exact transform is used."""
    eps: PositiveFloat | None = None
    """Largest norm of K in the series; None sets no limit."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    iterations: Annotated[PositiveInt, Field(le=1000)] | None = None
    """Number of steps of a fast approximation of the singular vectors; None computes them exactly."""


class PSOFTOperator(LowRankOperator):
    """The rotation of one weight's principal subspace."""

    A: Tensor
    B: Tensor

    def __init__(self, site: Site, config: PSOFTConfig) -> None:
        super().__init__(site, config.dropout)
        self.series, self.eps, self.orthogonal = config.series, config.eps, config.orthogonal
        self.rank = rank_within(site, config.rank)
        U, S, V = principal(as_matrix(site), self.rank, config.iterations)
        left, right = (S, torch.ones_like(S)) if config.singular_values == "outputs" else (S.sqrt(), S.sqrt())
        self.register_buffer("A", as_rows(site, right.unsqueeze(-1) * V).contiguous())  # [*batch, rank, in, *kernel]
        self.register_buffer("B", (U * left.unsqueeze(-2)).contiguous())  # [*batch, out, rank]
        square = torch.eye(self.rank).repeat(*site.batch, 1, 1)
        self.K = nn.Parameter(torch.zeros(*site.batch, math.comb(self.rank, 2)) if self.orthogonal else square)
        self.b = nn.Parameter(torch.ones(*site.batch, self.rank)) if config.scale_outputs else None
        self.a = nn.Parameter(torch.ones(*site.batch, self.rank)) if config.scale_inputs else None

    def rotation(self) -> Tensor:
        """Return R, [*batch, rank, rank]."""
        if not self.orthogonal:
            return self.K
        entries = -precise(self.K).unsqueeze(-2)  # the kernels turn the other way
        if self.series is None:
            return cayley(entries, self.rank).squeeze(-3)
        if self.eps is not None:
            norm = math.sqrt(2) * torch.linalg.vector_norm(entries, dim=-1, keepdim=True)
            entries = entries * (self.eps / norm.clamp(min=self.eps))
        return neumann(entries, self.rank, self.series).squeeze(-3)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        R = self.rotation()
        R = R if self.b is None else self.b.unsqueeze(-1) * R
        R = R if self.a is None else R * self.a.unsqueeze(-2)
        change = R - torch.eye(self.rank, device=R.device, dtype=R.dtype)
        return self.A, self.B @ change.to(self.B.dtype), 1.0


class PSOFT(Method):
    """Orthogonal fine-tuning of the principal subspace."""

    name = "psoft"
    Config = PSOFTConfig
    tags = Tags(category="reparameterized", paper="2505.11235", mergeable=True, low_rank=True)
    learning_rate = LearningRate(
        6e-4, "fei407/PSOFT@783a5e2, 1-NLU/script/deberta_v3_base_psoft-cola.sh", on="DeBERTa-v3-base, CoLA"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: PSOFTConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, PSOFTOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: PSOFTConfig) -> int:
        rank = rank_within(site, config.rank)
        square = math.comb(rank, 2) if config.orthogonal else rank * rank
        return math.prod(site.batch) * (square + rank * (config.scale_outputs + config.scale_inputs))
