"""PiSSA: principal singular values and vectors adaptation.   Meng et al. 2024, arXiv 2404.02948 (GraphPKU/PiSSA).

Equation:
    W = U S V',   B0 = U_r sqrt(S_r / s),   A0 = sqrt(S_r / s) V_r'       of the r largest singular values
    W' = (W - s B0 A0) + s B A = W + s (B A - B0 A0),   A = A0 and B = B0 at first,   s = alpha / rank

PiSSA is a LoRA that starts at the most important directions of the weight, with gradients in both factors from the
first step. The base is unchanged, and A0 and B0 are frozen buffers, so the adapter fits the original base. The change
of the weight is that of a LoRA of twice the rank.

With `dropout` the output is W x + s (B A dropout(x) - B0 A0 x), as in peft: training then drops parts of the base's
output, from the first step on. Kernels of convolutions are decomposed as [out, in * kernel], embeddings as [dim, num],
and each expert separately.

Parameters: rank * (in * kernel + out) a site, times the number of experts; rank at most that of the weight.

Start: A = A0 and B = B0: the identity.

Differs from the authors' code: The authors' code and peft write W - s B0 A0 into the base; outputs and gradients are
the same. The authors use no dropout. peft supports linear layers only, without float64.

Use it: `peftcore.apply(model, "pissa")`, instead of LoRA where training is short. Use the learning rate of LoRA and
alpha = rank.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore_reparameterized._decomposed import PairOperator, as_matrix, as_rows, principal, rank_within
from peftcore_reparameterized._low_rank import low_rank_count


class PiSSAConfig(MethodConfig):
    """Options of PiSSA."""

    method: Literal["pissa"] = "pissa"
    rank: PositiveInt = 8
    """Number of adapted singular values; at most that of the weight."""
    alpha: PositiveFloat = 8.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.0
    """Probability with which inputs of the trained factors are dropped in training."""
    iterations: Annotated[PositiveInt, Field(le=1000)] | None = None
    """Number of steps of a fast approximation of the singular vectors; 4 to 16 are usual. None computes them
    exactly."""


class PiSSAOperator(PairOperator):
    """The principal part of one weight, which trains, and its frozen initial value."""

    def __init__(self, site: Site, config: PiSSAConfig) -> None:
        scale = config.alpha / config.rank
        U, S, V = principal(as_matrix(site), rank_within(site, config.rank), config.iterations)
        root = (S / scale).sqrt()
        super().__init__(site, as_rows(site, root.unsqueeze(-1) * V), U * root.unsqueeze(-2), scale, config.dropout)


class PiSSA(Method):
    """Principal singular values and vectors adaptation."""

    name = "pissa"
    Config = PiSSAConfig
    tags = Tags(category="reparameterized", paper="2404.02948", mergeable=True, low_rank=True)
    learning_rate = LearningRate(
        2e-5, "GraphPKU/PiSSA@87f4db6, scripts/metamath_llama2_7b/run_pissa.sh", on="Llama-2-7B, MetaMathQA"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: PiSSAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, PiSSAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: PiSSAConfig) -> int:
        return low_rank_count(site, rank_within(site, config.rank))
