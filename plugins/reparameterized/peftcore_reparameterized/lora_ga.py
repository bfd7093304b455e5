"""LoRA-GA: low-rank adaptation that starts along the gradient.   Wang et al. 2024, arXiv 2407.05000
(Outsider565/LoRA-GA).

Equation:
    G = mean of dL/dW over the batches = U S V',   A0 = k V_I',   B0 = k U_J,   k = out^(1/4) / sqrt(gamma)
    W' = W - s B0 A0 + s B A = W + s (B A - B0 A0),   A = A0 and B = B0 at first,   s = alpha / rank

I and J are disjoint halves of the 2 r largest directions. So the first step of A and B changes the weight by the matrix
of rank 2 r that is nearest to a step of W itself. ``data=`` contains batches of the training data with their loss. The
gradient is computed in training mode, as in the authors' code.

The base is unchanged, and A0 and B0 are frozen buffers. form="peft" selects the initial factors of peft. There, B0 also
contains the singular values of G, and only B0 is multiplied by k (or by the number that `scale` selects), so B0 A0 is
as large as the gradient. U and V are approximated from 4 r directions (`iterations`). Kernels of convolutions are
decomposed as [out, in * kernel], and each expert is decomposed separately.

Parameters: rank * (in * kernel + out) a site, times the number of experts; rank at most half that of the weight.

Start: A = A0 and B = B0: the identity.

Differs from the authors' code: The authors' code and peft write W - s B0 A0 into the base, so that the changed base, or
A0 and B0, must be saved with the adapter; outputs and gradients are the same. direction="random", which both have, is
not supported here.

Use it: `peftcore.apply(model, "lora_ga", data=batches)`, instead of LoRA where training is short. At the start it needs
memory for the gradients of all target weights.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
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
    sees_vectors,
)
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._decomposed import PairOperator, as_matrix, as_rows, nearly_principal, rank_within
from peftcore_reparameterized._gradients import gradients_of
from peftcore_reparameterized._low_rank import low_rank_count


class LoRAGAConfig(MethodConfig):
    """Options of LoRA-GA."""

    method: Literal["lora_ga"] = "lora_ga"
    rank: PositiveInt = 8
    """Number of directions of each factor; at most half of the number of the gradient's directions."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.0
    """Probability with which inputs of the trained factors are dropped in training."""
    direction: Literal["ArB2r", "A2rBr", "ArBr"] = "ArB2r"
    """How the 2 r directions are divided: A has the first half and B the second ("ArB2r"), the reverse ("A2rBr"), or B
    has every other direction from the first one on and A the rest ("ArBr")."""
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    """The number that the factors are multiplied by: k ("stable"), a number computed from the singular values of the
    weight ("weight_svd"), 1 / s ("gd_scale"), or 1 ("unit")."""
    gamma: PositiveFloat = 16.0
    """gamma in the equation of k. A larger value makes A0 and B0 smaller."""
    form: Literal["authors", "peft"] = "authors"
    """The initial factors: those of the authors' code, or those of peft, where B0 also contains the singular values of
    G."""
    iterations: Annotated[PositiveInt, Field(le=1000)] | None = 4
    """Number of steps of a fast approximation of the singular vectors; None computes them exactly."""


def rank_of(site: Site, config: LoRAGAConfig) -> int:
    """Return the number of directions of a factor.

    Raises:
        UnsupportedSite: the weight has a single direction.
    """
    if not (rank := min(config.rank, rank_within(site, 2 * config.rank) // 2)):
        raise UnsupportedSite(f"{site.path} has a single singular direction, which cannot be split in half; exclude it")
    return rank


class LoRAGAOperator(PairOperator):
    """The trained factors of one weight, and their frozen initial values. All are zero until `decompose` sets them."""

    def __init__(self, site: Site, config: LoRAGAConfig) -> None:
        if site.layer.packed and not sees_vectors(site):
            raise UnsupportedSite(f"{site.path} is quantized, so its weight has no gradient; exclude it, or use pissa")
        rank = rank_of(site, config)
        A = torch.zeros(*site.batch, rank, site.in_features, *site.kernel)
        super().__init__(
            site, A, torch.zeros(*site.batch, site.out_features, rank), config.alpha / config.rank, config.dropout
        )

    @torch.no_grad()
    def decompose(self, site: Site, config: LoRAGAConfig, gradient: Tensor) -> None:
        """Set A and B, and their frozen initial values, from the gradient of the weight, [*batch, out, in * kernel]."""
        r = self.B.shape[-1]
        U, S, V = nearly_principal(gradient, 2 * r, 4 * r, config.iterations)
        of_A, of_B = {
            "ArB2r": (slice(r), slice(r, 2 * r)),
            "A2rBr": (slice(r, 2 * r), slice(r)),
            "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        }[config.direction]
        A, B, S = V[..., of_A, :], U[..., of_B], S[..., of_B].unsqueeze(-2)  # S: [*batch, 1, r]
        by_A = by_B = self._factor(site, config)
        if config.form == "peft":
            B = B * S
            by_A = by_A if config.scale == "gd_scale" else 1.0
            by_B = by_B / S[..., :1].clamp_min(1e-30) if config.scale == "weight_svd" else by_B
        self.start(as_rows(site, A * by_A), B * by_B)

    def _factor(self, site: Site, config: LoRAGAConfig) -> Any:
        """Return the number that the factors are multiplied by. With scale="weight_svd" and form="peft", it is the
        largest singular value of the weight."""
        if config.scale == "stable":
            return site.out_features**0.25 / config.gamma**0.5
        if config.scale == "weight_svd":
            S = torch.linalg.svdvals(as_matrix(site))[..., : self.B.shape[-1]]
            found = S[..., :1] if config.form == "peft" else (S / self.scale).sqrt().mean(-1, keepdim=True)
            return found.unsqueeze(-1)  # [*batch, 1, 1]
        return 1 / self.scale if config.scale == "gd_scale" else 1.0


class LoRAGA(Method):
    """Low-rank adaptation from the directions of the gradient."""

    name = "lora_ga"
    Config = LoRAGAConfig
    tags = Tags(category="reparameterized", paper="2407.05000", mergeable=True, low_rank=True, needs_data=True)
    learning_rate = LearningRate(
        2e-5, "Outsider565/LoRA-GA@89af7de, examples/float_llama2-7b_metamath.py", on="Llama-2-7B, MetaMathQA"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: LoRAGAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, LoRAGAOperator, config)

    def calibrate(self, model: nn.Module, data: Batches, config: LoRAGAConfig, injection: AppliedMethod) -> None:
        for graft, gradient in gradients_of(injection.grafts, model, data, injection):
            graft.operator.decompose(graft.site, config.at(graft.site.path), gradient)

    @staticmethod
    def parameter_count(site: Site, config: LoRAGAConfig) -> int:
        return low_rank_count(site, rank_of(site, config))
