"""LoRA-One: low-rank adaptation that starts with one step along the full gradient.   Zhang et al. 2025,
arXiv 2502.01235 (YuanheZ/LoRA-One).

Equation:
    -G = U S V',   G = mean of dL/dW over the batches;   D = sqrt(S_r / (S_1 gamma)),   A0 = D V_r',   B0 = U_r D
    y = W x + b + s B A dropout(x),   A = A0 and B = B0 at first,   s = alpha / sqrt(rank)

B0 A0 is the matrix of rank r that is nearest to a step of gradient descent on the weight itself, with the learning rate
1 / (S_1 gamma). The paper shows that the factors of LoRA would align with these directions anyway. W itself is
unchanged, so the adapter changes outputs from the start. ``data=`` contains batches of the training data with their
loss; 8 to 64 samples are enough. The gradient is computed in training mode, as in the authors' code.

Singular vectors are computed by a fast approximation from 512 directions (`iterations`), as in the authors' code.
`damping` enables the preconditioners of Riemannian preconditioned LoRA (see the page of LoRA), from which those of the
paper's algorithm are derived. They are applied by the optimizer of `injection.optimizer`.

Kernels of convolutions are decomposed as [out, in * kernel], and each expert is decomposed separately. If a weight has
fewer directions than the rank, the others start as in LoRA. So do the factors of an expert without a gradient.

Parameters: rank * (in * kernel + out) a site, times the number of experts.

Start: A = A0 and B = B0: the adapter changes outputs from the start.

Differs from the authors' code: The authors' page and the paper have S instead of its root, and no S_1. The authors'
code has the root and S_1, and so has this method. Other values of the option `scale` in that code are not supported.
The preconditioners of the paper's algorithm were not released with that code.

Use it: `peftcore.apply(model, "lora_one", data=batches)`, instead of LoRA where the data is available before training.
At the start it needs memory for the gradients of all target weights.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    AppliedMethod,
    Batches,
    GradientRule,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
    sees_vectors,
)
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._decomposed import as_rows, nearly_principal
from peftcore_reparameterized._gradients import gradients_of
from peftcore_reparameterized._low_rank import low_rank_count
from peftcore_reparameterized._preconditioned import Preconditioned, Preconditioner, riemannian
from peftcore_reparameterized.lora import LoRAOperator

WIDTH = 512
"""Number of directions of the approximation of singular vectors."""


class LoRAOneConfig(MethodConfig):
    """Options of LoRA-One: those of LoRA, and those of the initial factors."""

    method: Literal["lora_one"] = "lora_one"
    rank: PositiveInt = 8
    """Rank of the update."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / sqrt(rank)``."""
    scaling: Literal["rank", "sqrt_rank"] = "sqrt_rank"
    """Denominator of the scale: the rank, or its square root."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    gamma: PositiveFloat = 128.0
    """gamma in the equation of D. A larger value makes A0 and B0 smaller."""
    damping: NonNegativeFloat | None = None
    """Damping of the preconditioner of both gradients. With None, gradients are not changed."""
    iterations: Annotated[PositiveInt, Field(le=1000)] | None = 16
    """Number of steps of a fast approximation of the singular vectors; None computes them exactly."""


@torch.no_grad()
def decompose(operator: LoRAOperator, site: Site, config: LoRAOneConfig, gradient: Tensor) -> None:
    """Set A and B from the gradient of the weight, [*batch, out, in * kernel]."""
    U, S, V = nearly_principal(-gradient, config.rank, WIDTH, config.iterations)
    found = S.shape[-1]
    largest = S[..., :1].unsqueeze(-1)  # [*batch, 1, 1]
    root = (S / (largest.squeeze(-1).clamp_min(1e-30) * config.gamma)).sqrt().unsqueeze(-1)  # [*batch, found, 1]
    A, B = operator.A.flatten(operator.B.dim() - 1), operator.B.clone()
    A = torch.cat([torch.where(largest > 0, root * V, A[..., :found, :]), A[..., found:, :]], -2)
    B[..., :found] = torch.where(largest > 0, U * root.mT, B[..., :found])
    operator.A.copy_(as_rows(site, A))
    operator.B.copy_(B)


class LoRAOne(Method):
    """Low-rank adaptation from one step along the full gradient."""

    name = "lora_one"
    Config = LoRAOneConfig
    tags = Tags(
        category="reparameterized",
        paper="2502.01235",
        mergeable=True,
        identity_at_init=False,
        low_rank=True,
        needs_data=True,
    )
    learning_rate = LearningRate(2e-4, "YuanheZ/LoRA-One@01bba05, README.md", on="Llama-2-7B, MetaMathQA")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: LoRAOneConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            if site.layer.packed and not sees_vectors(site):
                raise UnsupportedSite(
                    f"{site.path} is quantized, so its weight has no gradient; exclude it, or use lora"
                )
            surgeon.graft(site, LoRAOperator, config)

    def calibrate(self, model: nn.Module, data: Batches, config: LoRAOneConfig, injection: AppliedMethod) -> None:
        for graft, gradient in gradients_of(injection.grafts, model, data, injection):
            decompose(graft.operator, graft.site, config.at(graft.site.path), gradient)

    def gradient_rule(self, injection: AppliedMethod) -> GradientRule | None:
        of: dict[nn.Parameter, Preconditioner] = {}
        for graft in injection.grafts:
            here = injection.config.at(graft.site.path)
            if (
                isinstance(graft.operator, LoRAOperator)
                and isinstance(here, LoRAOneConfig)
                and here.damping is not None
            ):
                of |= riemannian(graft.operator, here.damping)
        return Preconditioned(of) if of else None

    @staticmethod
    def parameter_count(site: Site, config: LoRAOneConfig) -> int:
        return low_rank_count(site, config.rank)
