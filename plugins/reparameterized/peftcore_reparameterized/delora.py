"""DeLoRA: low-rank adaptation whose angle and strength are decoupled.   Bini et al. 2025, arXiv 2503.18225
(ExplainableML/DeLoRA, in peft by its first author).

Equation:
    W' = W + lambda / rank sum_i b_i a_i diag(n) / (||a_i|| ||b_i||),   n_j = ||W[:, j]||,   i = 1 … rank

The update depends only on the directions of the rows a_i of A and columns b_i of B, not on their lengths. So its norm
is at most lambda max(n), however long training runs. The strength lambda is trained, one number for each site. n
contains the lengths of the weight's columns at the time when the adapter is installed. It is saved in the file, as in
peft.

After the first step, however short it is, B has a direction, and the update has nearly its full size. So use a warmup
of the learning rate. `dropout` (`module_dropout` in peft) drops inputs of the update.

Convolutions count as [out, in * kernel]. Embeddings count as [dim, num]. Each expert has separate A, B, lambda and n.

Parameters: rank * (in * kernel + out) + 1 a site, times the number of experts.

Start: A uniform in +-1/sqrt(in) and B at zero, as in peft: lengths below 1e-4 count as 1e-4, so that W' = W, the
identity. In embeddings A is zero and B ~ N(0, 1).

Differs from the authors' code: The paper calls a start with B at zero unstable at times. There, A and B are both random
at first, and a frozen copy of their product is subtracted from the weight. Files of peft cannot contain that copy. The
authors train lambda with a separate learning rate, which on MNLI is three times that of the other parameters. peft
supports linear layers only.

Use it: `peftcore.apply(model, "delora")`, where training is long or the best learning rate is uncertain: the weights
remain close to those of the base model.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore_reparameterized._low_rank import LowRankOperator, low_rank_count, low_rank_factors

SHORTEST = 1e-4
"""Lower bound of the lengths that rows and columns are divided by."""


class DeLoRAConfig(MethodConfig):
    """Options of DeLoRA."""

    method: Literal["delora"] = "delora"
    rank: PositiveInt = 8
    """Rank of the update."""
    strength: PositiveFloat = 15.0
    """Initial value of lambda, which bounds the norm of the update relative to the length of the weight's longest
    column."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""


def lengths(values: Tensor, dim: int) -> Tensor:
    """Return vector norms along a dimension, which is kept with size one."""
    return torch.linalg.vector_norm(values, dim=dim, keepdim=True)


class DeLoRAOperator(LowRankOperator):
    """The update of one target module."""

    n: Tensor

    def __init__(self, site: Site, config: DeLoRAConfig) -> None:
        super().__init__(site, config.dropout)
        self.A, self.B = low_rank_factors(site, config.rank)  # [*batch, rank, in, *kernel], [*batch, out, rank]
        self.strength = nn.Parameter(torch.full((*site.batch, 1), config.strength))
        weight = site.base_weight().detach()
        precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
        self.register_buffer("n", lengths(precise, len(site.batch)))  # [*batch, 1, in, *kernel]

    def factors(self) -> tuple[Tensor, Tensor, float]:
        rank, flat = self.B.shape[-1], self.A.flatten(self.B.dim() - 1)
        of_A, of_B = lengths(flat, -1).clamp(min=SHORTEST), lengths(self.B, -2).clamp(min=SHORTEST)
        scale = self.strength.unsqueeze(-1) / rank / (of_A.mT * of_B)  # [*batch, 1, rank]
        return self.A * self.n, self.B * scale, 1.0


class DeLoRA(Method):
    """Low-rank adaptation of bounded strength."""

    name = "delora"
    Config = DeLoRAConfig
    tags = Tags(category="reparameterized", paper="2503.18225", mergeable=True, low_rank=True)
    learning_rate = LearningRate(1e-3, "ExplainableML/DeLoRA@2dd91e1, scripts/glue_eval.sh", on="RoBERTa-base, MNLI")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: DeLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, DeLoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: DeLoRAConfig) -> int:
        return low_rank_count(site, config.rank) + math.prod(site.batch)
