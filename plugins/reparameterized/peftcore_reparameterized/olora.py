"""OLoRA: orthonormal low-rank adaptation.   Büyükakyüz 2024, arXiv 2406.01775 (in peft by its author).

Equation:
    W = Q R,   B0 = Q[:, :r],   A0 = R[:r]       the diagonal of R positive, which makes the two unique
    W' = (W - s B0 A0) + s B A = W + s (B A - B0 A0),   A = A0 and B = B0 at first,   s = alpha / rank

OLoRA is a LoRA whose B starts with orthonormal columns that span the first r columns of W. As in the paper, the factors
are not divided by a power of s, so s scales the part of W that is replaced. The base is unchanged, and A0 and B0 are
frozen buffers, so the adapter fits the original base. The change of the weight is that of a LoRA of twice the rank.

With `dropout` the output is W x + s (B A dropout(x) - B0 A0 x), as in peft: training then drops parts of the base's
output, from the first step on. Kernels of convolutions are decomposed as [out, in * kernel], embeddings as [dim, num],
and each expert separately.

Parameters: rank * (in * kernel + out) a site, times the number of experts; rank at most that of the weight.

Start: A = A0 and B = B0: the identity.

Differs from the authors' code: The code in peft, which is by the author, writes W - s B0 A0 into the base. Outputs and
gradients are the same. It decomposes transformers' Conv1D as it is stored, transposed, so its factors do not fit the
layer. peftcore decomposes the [out, in] matrix.

Use it: `peftcore.apply(model, "olora")`, instead of LoRA where training is short, and the decomposition of `pissa`
takes too long.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore_reparameterized._decomposed import PairOperator, as_matrix, as_rows, positive, rank_within
from peftcore_reparameterized._low_rank import low_rank_count


class OLoRAConfig(MethodConfig):
    """Options of OLoRA."""

    method: Literal["olora"] = "olora"
    rank: PositiveInt = 8
    """Number of adapted columns of Q; at most the number of all columns."""
    alpha: PositiveFloat = 8.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.0
    """Probability with which inputs of the trained factors are dropped in training."""


class OLoRAOperator(PairOperator):
    """The first columns of Q and rows of R of one weight, which train, and their frozen initial values."""

    def __init__(self, site: Site, config: OLoRAConfig) -> None:
        rank = rank_within(site, config.rank)
        Q, R = torch.linalg.qr(as_matrix(site))
        sign = positive(R.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)  # [*batch, 1, min(out, in * kernel)]
        Q, R = Q * sign, R * sign.mT
        scale = config.alpha / config.rank
        super().__init__(site, as_rows(site, R[..., :rank, :]), Q[..., :rank], scale, config.dropout)


class OLoRA(Method):
    """Orthonormal low-rank adaptation."""

    name = "olora"
    Config = OLoRAConfig
    tags = Tags(category="reparameterized", paper="2406.01775", mergeable=True, low_rank=True)
    learning_rate = LearningRate(
        3e-4, "huggingface/peft@5d602fd, examples/olora_finetuning/olora_finetuning.py", on="OPT-350m, Alpaca"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: OLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, OLoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: OLoRAConfig) -> int:
        return low_rank_count(site, rank_within(site, config.rank))
