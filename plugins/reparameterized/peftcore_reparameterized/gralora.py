"""GraLoRA: granular low-rank adaptation.   Jung et al. 2025, arXiv 2505.20355 (SqueezeBits/GraLoRA).

Equation:
    W'[j, n] = W[j, n] + s B_j[:, n] A_n[j, :],   s = alpha / rank,   j, n = 1 … k

The weight is cut into k * k blocks, W[j, n] from the n-th part of the inputs to the j-th part of the outputs, and each
has a low-rank update of rank / k. The blocks of a column n share A_n [rank, in / k]: W[j, n] uses the j-th part of its
rows. The blocks of a row j share B_j [out / k, rank]: W[j, n] uses the n-th part of its columns. So there are as many
parameters as in LoRA, and the update has a rank of up to k * rank.

With `hybrid_rank` a LoRA of that rank is added in parallel, and s = alpha / (rank + hybrid_rank); the option `r` is the
sum of both in the authors' code, and `rank` in peft.

Kernels of convolutions count as inputs (in * kernel), and embeddings count as [dim, num]. k must divide both sides.
Each expert has separate blocks.

Parameters: (rank + hybrid_rank) * (in * kernel + out) a site, times the number of experts.

Start: A uniform in +-sqrt(k / in), B at zero; of embeddings A at zero and B ~ N(0, 1): the identity.

Differs from the authors' code: The authors and peft apply dropout to the inputs of the two parts one after the other;
here it is applied once for both. peft accepts inputs of two and three dimensions only.

Use it: `peftcore.apply(model, "gralora")`, instead of LoRA at high ranks, where a few input channels are so large that
they dominate the gradient of A.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._basis import columns
from peftcore_reparameterized._low_rank import LowRankOperator, low_rank_count, low_rank_factors


class GraLoRAConfig(MethodConfig):
    """Options of GraLoRA."""

    method: Literal["gralora"] = "gralora"
    rank: PositiveInt = 32
    """Number of rows of each A; `blocks` must divide it."""
    alpha: PositiveFloat = 64.0
    """Numerator of the scale ``alpha / (rank + hybrid_rank)``."""
    blocks: PositiveInt = 2
    """Number k of parts into which inputs and outputs are split. Use 2 up to rank 32, and 4 from rank 64 on."""
    hybrid_rank: NonNegativeInt = 0
    """Rank of a LoRA of the whole weight in parallel with the blocks."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""

    @model_validator(mode="after")
    def _check_blocks(self) -> GraLoRAConfig:
        if self.rank % self.blocks:
            raise ValueError(f"rank={self.rank} is not a multiple of blocks={self.blocks}; set one that is")
        return self


class GraLoRAOperator(LowRankOperator):
    """The blocks of one weight's update."""

    def __init__(self, site: Site, config: GraLoRAConfig) -> None:
        super().__init__(site, config.dropout)
        k, inputs, out = config.blocks, columns(site), site.out_features
        if inputs % k or out % k:
            raise UnsupportedSite(
                f"{site.path} is {out} x {inputs}, which blocks={k} does not divide; set another number for it with "
                "overrides=, or exclude the site"
            )
        self.inputs = (site.in_features, *site.kernel)
        self.scale = config.alpha / (config.rank + config.hybrid_rank)
        A, B = torch.zeros(*site.batch, k, config.rank, inputs // k), torch.zeros(*site.batch, k, out // k, config.rank)
        if site.layer.one_hot:
            B.normal_()  # an input picks a single column of A
        else:
            A.uniform_(-math.sqrt(k / inputs), math.sqrt(k / inputs))
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        if config.hybrid_rank:
            self.hybrid_A, self.hybrid_B = low_rank_factors(site, config.hybrid_rank)
        self.hybrid = config.hybrid_rank > 0

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return the factors of the whole update, of rank k * rank. Most of their entries are zero."""
        k, part = self.A.shape[-3], self.A.shape[-2] // self.A.shape[-3]
        same = torch.eye(k, device=self.A.device, dtype=self.A.dtype)
        A = self.A.unsqueeze(-2) * same[:, None, :, None]  # [*batch, n, rank, n, in / k]
        B = self.B.unflatten(-1, (k, 1, part)) * same[:, None, None, :, None]  # [*batch, j, out / k, n, j, rank / k]
        A, B = A.flatten(-4, -3).flatten(-2), B.flatten(-3).flatten(-3, -2)
        if self.hybrid:
            flat = self.hybrid_A.flatten(self.layer.batch_dims + 1)
            A, B = torch.cat([A, flat], -2), torch.cat([B, self.hybrid_B], -1)
        return A.unflatten(-1, self.inputs), B, self.scale

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not self.layer.of_vectors:
            return super().forward(call, x)
        y, k = call(x), self.A.shape[-3]
        dropped = F.dropout(x, self.input_dropout) if self.training and self.input_dropout else x
        A, B = self.cast(y, self.A, self.B)
        low = torch.einsum("...ni,nri->...nr", dropped.unflatten(-1, (k, -1)), A)
        low = low.unflatten(-1, (k, -1)).transpose(-3, -2).flatten(-2)  # [..., j, rank]: a part for each n
        update = torch.einsum("...jr,jor->...jo", self.scale * low, B).flatten(-2)
        if self.hybrid:
            hybrid_A, hybrid_B = self.cast(y, self.hybrid_A, self.hybrid_B)
            update = self.layer.add(update, self.layer.apply(dropped, hybrid_A), hybrid_B, self.scale)
        return y + update


class GraLoRA(Method):
    """Low-rank adaptation of blocks of a weight."""

    name = "gralora"
    Config = GraLoRAConfig
    tags = Tags(category="reparameterized", paper="2505.20355", mergeable=True, low_rank=True)
    learning_rate = LearningRate(
        2e-4, "SqueezeBits/GraLoRA@7dd2945, scripts/train/llm.llama-3_1-8b+data.code.sh", on="Llama-3.1-8B, code, Lion"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: GraLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, GraLoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: GraLoRAConfig) -> int:
        return low_rank_count(site, config.rank + config.hybrid_rank)
