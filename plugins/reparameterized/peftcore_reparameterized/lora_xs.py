"""LoRA-XS: low-rank adaptation with an extremely small number of parameters.   Bałazy et al. 2024, arXiv 2405.17604
(MohammadrezaBanaei/LoRA-XS).

Equation:
    W = U S V',   B = U_r,   A = S_r V_r'       of the r largest singular values, frozen
    y = W x + b + s B R A dropout(x),   R [r, r],   s = alpha / rank

Only R trains, between the most important directions of the weight, so its size does not depend on that of the layer. A
contains the singular values, as in the authors' code. The vectors are exact unless `iterations` is set. Kernels of
convolutions are decomposed as [out, in * kernel], embeddings as [dim, num], and each expert separately.

R depends on A and B, and a decomposition on another machine would give different factors, at least by rounding. So A
and B are saved in the adapter's file, which is as large as that of LoRA. Only the trained parameters and the state of
the optimizer are smaller.

start="gradient" is LoRA-SB (Ponkshe et al. 2024, arXiv 2411.19557; CERT-Lab/lora-sb). s B R A is the matrix of rank r
nearest to the first step that AdamW would make on the weight itself. That step is nearly -step sign(gradient):

    -step sign(G) = U S V',   B = U_r,   R = S_r / s,   A = V_r'      G = mean of dL/dW over the batches of ``data=``

A and B are orthonormal. So with s = 1, a step of R along its gradient is the best step of W within their span. The
authors set alpha = rank for that. `step` is a learning rate. The authors use the rate at the first step of their
warmup, and train with 1e-4 on MetaMathQA. Quantized weights can start in this way too, because they have a gradient.

Parameters: rank * rank a site, times the number of experts; rank at most that of the weight.

Start: R ~ N(0, 1e-5): a fresh adapter changes outputs a little; ``std=0`` makes it an identity. With start="gradient" W
is unchanged, so the adapter changes outputs from the start.

Differs from the authors' code: The code of LoRA-XS computes singular vectors by a fast approximation in 10 iterations.
The code of LoRA-SB sums gradients of losses that are divided by the size of the batch, which gives the same signs if
all batches have the same size. It rounds A, B and R to bfloat16.

Use it: `peftcore.apply(model, "lora_xs")`, where thousands of adapters, or their optimizers, must be in memory at once.
Use a larger learning rate than for LoRA.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    AppliedMethod,
    Batches,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
)
from peftcore_reparameterized._decomposed import as_matrix, as_rows, nearly_principal, principal, rank_within
from peftcore_reparameterized._gradients import gradients_of
from peftcore_reparameterized._low_rank import LowRankOperator


class LoRAXSConfig(MethodConfig):
    """Options of LoRA-XS."""

    method: Literal["lora_xs"] = "lora_xs"
    rank: PositiveInt = 16
    """Number of singular directions that R mixes; at most that of the weight."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / rank``."""
    std: NonNegativeFloat = 1e-5
    """Standard deviation of R at the start; with 0 a fresh adapter leaves outputs unchanged."""
    start: Literal["weight", "gradient"] = "weight"
    """The matrix whose singular vectors are in A and B: the weight, or the first step of the weight (LoRA-SB), which
    needs data."""
    step: NonNegativeFloat = 3e-7
    """The learning rate of the first step in LoRA-SB. With 0 a fresh adapter leaves outputs unchanged."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    iterations: Annotated[PositiveInt, Field(le=1000)] | None = None
    """Number of steps of a fast approximation of the singular vectors; None computes them exactly."""


class LoRAXSOperator(LowRankOperator):
    """The trained matrix R of one site, and the frozen factors A and B of its weight."""

    A: Tensor
    B: Tensor

    def __init__(self, site: Site, config: LoRAXSConfig) -> None:
        super().__init__(site, config.dropout)
        self.scale = config.alpha / config.rank
        rank = rank_within(site, config.rank)
        if config.start == "gradient":
            self.register_buffer("A", torch.zeros(*site.batch, rank, site.in_features, *site.kernel))
            self.register_buffer("B", torch.zeros(*site.batch, site.out_features, rank))
            self.R = nn.Parameter(torch.zeros(*site.batch, rank, rank))
            return
        U, S, V = principal(as_matrix(site), rank, config.iterations)
        self.register_buffer("A", as_rows(site, S.unsqueeze(-1) * V).contiguous())
        self.register_buffer("B", U.contiguous())
        self.R = nn.Parameter(torch.randn(*site.batch, rank, rank) * config.std)

    @torch.no_grad()
    def decompose(self, site: Site, config: LoRAXSConfig, gradient: Tensor) -> None:
        """Set A, B and R from the gradient of the weight, [*batch, out, in * kernel]."""
        rank = self.R.shape[-1]
        U, S, V = nearly_principal(-gradient.sign(), rank, rank, config.iterations)
        self.A.copy_(as_rows(site, V))
        self.B.copy_(U)
        self.R.copy_(torch.diag_embed(config.step / self.scale * S))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.A, self.B @ self.R, self.scale


class LoRAXS(Method):
    """Low-rank adaptation in which only a core matrix trains."""

    name = "lora_xs"
    Config = LoRAXSConfig
    tags = Tags(
        category="reparameterized",
        paper="2405.17604",
        mergeable=True,
        identity_at_init=False,
        identity_options={"std": 0.0, "step": 0.0},
        data_options={"start": "gradient"},
        low_rank=True,
    )
    learning_rate = LearningRate(
        4e-3, "MohammadrezaBanaei/LoRA-XS@e50b1a8, scripts/run_math_tuning.sh", on="Mistral-7B, MetaMathQA"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: LoRAXSConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, LoRAXSOperator, config)

    def calibrate(self, model: nn.Module, data: Batches, config: LoRAXSConfig, injection: AppliedMethod) -> None:
        started = [graft for graft in injection.grafts if config.at(graft.site.path).start == "gradient"]
        for graft, gradient in gradients_of(started, model, data, injection):
            graft.operator.decompose(graft.site, config.at(graft.site.path), gradient)

    @staticmethod
    def parameter_count(site: Site, config: LoRAXSConfig) -> int:
        return math.prod(site.batch) * rank_within(site, config.rank) ** 2
