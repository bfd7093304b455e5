"""PSOFT: orthogonal fine-tuning of the principal subspace.   Wu et al. 2025, arXiv 2505.11235 (fei407/PSOFT).

Equation:
    W = U S V',   B = U_r S_r,   A = V_r'       of the r largest singular values, frozen
    W' = W + B (diag(b) R diag(a) - I) A,   R = (I + K) (I - K)^-1,   K skew-symmetric [r, r]

The part of the weight that matters most turns within its own directions: while a and b are one, lengths of its columns
and angles between them stay. a and b [r] relax that; `scale_outputs` and `scale_inputs` leave them out. The entries
above the diagonal of K are trained. Without `orthogonal` R is any matrix. With `series` it is I + 2 K + 2 K^2 + … +
K^(series - 1), with the norm of K limited to `eps` if given. `singular_values` both gives A and B the root of S_r each,
as PiSSA.

The update is not scaled. A and B are in the adapter's file: R depends on them, and a second decomposition, on another
machine, would give different ones, by signs at least. They are exact unless `iterations` is given. Kernels count as
inputs, in * kernel; embeddings as [dim, num]; experts are decomposed each on its own.

Parameters: rank (rank - 1) / 2 + 2 rank a site, times the number of experts; rank at most that of the weight.

Start: K at zero, a and b at one: the identity.

Differs from the authors' code: The authors train the entries below the diagonal of K, with the other sign. Their series
has 5 powers, where peft has 4. peft divides its scale, alpha / rank, out of B first; its files lack A and B.

Use it: `peftcore.apply(model, "psoft")`, as OFT where memory is scarce: a step computes with nothing larger than LoRA's
factors.
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
    """Number of principal directions that turn; at most all of the weight's."""
    orthogonal: bool = True
    """Keep R a rotation; otherwise R is any matrix."""
    scale_outputs: bool = True
    """Train b, a factor of each direction behind R."""
    scale_inputs: bool = True
    """Train a, a factor of each direction in front of R."""
    singular_values: Literal["outputs", "both"] = "outputs"
    """The factor with the singular values: B, or both A and B with their square roots."""
    series: Annotated[int, Field(ge=4, le=100)] | None = None
    """Terms of a Neumann series instead of the exact transform; None is exact."""
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
