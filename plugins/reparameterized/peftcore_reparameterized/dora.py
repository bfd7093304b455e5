"""DoRA: weight-decomposed low-rank adaptation.   Liu et al. 2024, arXiv 2402.09353.

Equation:
    V = W + s B A,   W' = m V / ||V||,   s = alpha / rank

The norm is computed over the inputs, one for each row of the weight, as in the authors' code and in peft. Backward
treats it as a constant (section 4.3 of the paper). m is [out]. A row of zeros has no direction, and remains zero. With
`dropout` the addition to the layer's output, (W' - W) x, is computed from inputs with dropout, as in peft.

Parameters: rank * (in * kernel + out) + out a site, times the number of experts.

Start: m = ||W||, A and B as LoRA's, so that W' = W: the identity.

Differs from the authors' code: No difference is known. The authors' code was not compared; peft was. LyCORIS can also
compute the norm over the outputs.

Use it: `peftcore.apply(model, "dora")`, where LoRA at low rank is worse than full fine-tuning. It costs one pass over
the weight in each training step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    Held,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
    WeightOperator,
    matmul_transposed,
)
from peftcore_reparameterized._gains import gained
from peftcore_reparameterized._low_rank import (
    check_in_weight_form,
    input_dropout,
    low_rank_count,
    low_rank_factors,
    low_rank_update,
)


class DoRAConfig(MethodConfig):
    """Options of DoRA."""

    method: Literal["dora"] = "dora"
    rank: PositiveInt = 8
    """Rank of the update of the direction."""
    alpha: PositiveFloat = 8.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""


class DoRAOperator(WeightOperator):
    """Changes the direction of a weight's rows by a low-rank update, and their magnitude by a vector."""

    stackable = True
    padded, scaled = frozenset({"A", "B"}), frozenset({"B"})

    def __init__(self, site: Site, config: DoRAConfig) -> None:
        super().__init__(site)
        self.scale = config.alpha / config.rank
        self.dropout = input_dropout(site, config.dropout)
        self.A, self.B = low_rank_factors(site, config.rank)
        weight = site.weight()
        precise = torch.promote_types(weight.dtype, torch.float32)
        self.magnitude = nn.Parameter(self._norm(weight.to(precise)))  # [*batch, out]

    def _norm(self, weight: Tensor) -> Tensor:
        """Return the norms of rows [*batch, out]. For weights stored transposed, as in GPT-2,
        `torch.linalg.vector_norm` takes ten times as long as a sum of squares."""
        rows = weight.detach().flatten(self.layer.batch_dims + 1)
        return torch.linalg.vector_norm(rows, dim=-1) if rows.is_contiguous() else rows.square().sum(-1).sqrt()

    def prefers_activation_form(self, x: Tensor) -> bool:
        return True

    def prepare(self, held: Held) -> tuple[Tensor, Tensor | None]:
        """Return the gain [out] and the bias."""
        return self._gain(self._norm_beside(held.weight)), held.bias

    def activation_form(self, call: Callable[..., Tensor], x: Tensor, prepared: tuple[Tensor, Tensor | None]) -> Tensor:
        if self.training and self.dropout:
            return self._beside_dropped(call, x, *prepared)
        turned = self.layer.update(call, x, self.A, self.B, self.scale)  # V x + b
        return gained(self.layer, turned, *prepared)

    def _beside_dropped(self, call: Callable[..., Tensor], x: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """Return W x + b + (W' - W) dropout(x)."""
        dropped = F.dropout(x, self.dropout)
        base = call(dropped)
        A, B = self.cast(base, self.A, self.B)
        turned = self.layer.add(base, self.layer.apply(dropped, A), B, self.scale)  # V dropout(x) + b
        return call(x) + (gained(self.layer, turned, gain, bias) - base)

    @torch.no_grad()
    def _norm_beside(self, weight: Tensor) -> Tensor:
        """Return ||V|| from the products of rows, without V: |W|^2 + 2 s W.BA + s^2 |BA|^2."""
        precise = torch.promote_types(weight.dtype, torch.float32)
        W, A, B = (each.to(precise).flatten(1) for each in (weight, self.A, self.B))
        mixed = (matmul_transposed(W, A) * B).sum(-1)
        own = ((B @ (A @ A.mT)) * B).sum(-1)
        square = self._norm(W).square() + 2 * self.scale * mixed + self.scale**2 * own
        return square.clamp(min=0).sqrt()

    def _gain(self, norm: Tensor) -> Tensor:
        return self.magnitude / torch.where(norm == 0, 1.0, norm)

    def forward(self, weight: Tensor) -> Tensor:
        check_in_weight_form(self, self.dropout)
        return self.merged(weight)

    def merged(self, weight: Tensor) -> Tensor:
        direction = weight + self.scale * low_rank_update(self.A, self.B, weight)
        gain = self._gain(self._norm(direction))
        return direction * gain.view(*gain.shape, *[1] * (weight.dim() - gain.dim()))


class DoRA(Method):
    """Weight-decomposed low-rank adaptation."""

    name = "dora"
    Config = DoRAConfig
    tags = Tags(
        category="reparameterized",
        paper="2402.09353",
        mergeable=True,
        exact_gradient=False,  # the norm is held constant
    )
    learning_rate = LearningRate(
        2e-4, "NVlabs/DoRA@7e2f10a, commonsense_reasoning/llama_7B_Dora.sh", on="LLaMA-7B, commonsense"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: DoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, DoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: DoRAConfig) -> int:
        return low_rank_count(site, config.rank) + math.prod(site.batch) * site.out_features
