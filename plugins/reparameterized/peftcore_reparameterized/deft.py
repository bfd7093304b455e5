"""DEFT: decompositional efficient fine-tuning.   Kumar et al. 2025, arXiv 2509.22793 (MAXNORM8650/DEFT).

Equation:
    W' = (I - Q T') W + c Q R,   P [out, rank],   R [rank, in],   c = alpha / rank, or 1 without alpha

The weight's component along rank directions of its outputs is removed, and a trained component replaces it. With
projection="relu", Q is P, and T is P with its negative entries set to zero. With projection="qr", both are an
orthonormal basis of the columns of P, so Q T' is a projection. With injects=False there is no R, as in PaRa (arXiv
2406.05641), and the rank of the weight is reduced from the start.

With `dropout` inputs of R are dropped. Kernels of convolutions count as inputs, and embeddings count as [dim, num].
Each expert has a separate P and R.

Parameters: rank * (in * kernel + out) a site, rank * out without `injects`, times the number of experts; rank at most
that of the outputs.

Start: P ~ N(0, 0.02), R = T' W / c, which restores the removed component, as in peft: the identity. Without `injects`
the weight changes from the start.

Differs from the authors' code: The authors initialize R from N(0, 0.005), and drop inputs of the whole layer. peft
drops only the inputs of R, and so does peftcore. peft computes in float32, whatever the dtype of the model is.

Use it: `peftcore.apply(model, "deft")`, where training should replace old knowledge by new knowledge, such as a
personal subject in text-to-image generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
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
)
from peftcore_reparameterized._basis import columns
from peftcore_reparameterized._decomposed import as_matrix, as_rows
from peftcore_reparameterized._low_rank import check_in_weight_form, input_dropout
from peftcore_reparameterized._rotations import precise


class DEFTConfig(MethodConfig):
    """Options of DEFT."""

    method: Literal["deft"] = "deft"
    rank: PositiveInt = 8
    """Number of directions that are removed and injected; at most the number of outputs."""
    alpha: PositiveFloat | None = None
    """Numerator of the scale ``alpha / rank`` of the injected component; with None it is not scaled."""
    projection: Literal["relu", "qr"] = "relu"
    """How the removed component of the weight is computed: with the positive part of P ("relu"), or with an orthonormal
    basis of its columns ("qr")."""
    injects: bool = True
    """Inject a trained component; otherwise only remove one (PaRa)."""
    dropout: Share = 0.0
    """Probability with which inputs of the injected component are dropped in training."""


class DEFTOperator(WeightOperator):
    """The component removed from one weight, and the injected one."""

    def __init__(self, site: Site, config: DEFTConfig) -> None:
        super().__init__(site)
        rank = min(config.rank, site.out_features)
        self.projection, self.dropout = config.projection, input_dropout(site, config.dropout)
        self.scale = 1.0 if config.alpha is None else config.alpha / rank
        self.P = nn.Parameter(torch.randn(*site.batch, site.out_features, rank) * 0.02)
        self.R: nn.Parameter | None = None
        if config.injects:
            weight = as_matrix(site)
            start = self.directions()[1].detach().to(weight).mT @ weight / self.scale
            self.R = nn.Parameter(as_rows(site, start.to(self.P.dtype)))  # [*batch, rank, in, *kernel]

    def directions(self) -> tuple[Tensor, Tensor]:
        """Return Q and T, [*batch, out, rank]."""
        P = precise(self.P)
        if self.projection == "relu":
            return P, P.relu()
        Q = torch.linalg.qr(P).Q
        return Q, Q

    def prefers_activation_form(self, x: Tensor) -> bool:
        return self.layer.of_vectors or (self.training and self.dropout > 0)

    def prepare(self, held: Held) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return Q, T and the bias."""
        return *self.directions(), held.bias

    def activation_form(
        self, call: Callable[..., Tensor], x: Tensor, prepared: tuple[Tensor, Tensor, Tensor | None]
    ) -> Tensor:
        y, bias = call(x), prepared[2]
        Q, T = self.cast(y, *prepared[:2])
        base = y if bias is None else y - self.layer.along_channels(bias.to(y.dtype), y)
        low = -self.layer.mix(base, T.mT)
        if self.R is not None:
            (R,) = self.cast(y, self.R)
            low = low + self.scale * self.layer.apply_dropped(x, R, self.dropout if self.training else 0.0)
        return self.layer.add(y, low, Q, 1.0)

    def forward(self, weight: Tensor) -> Tensor:
        check_in_weight_form(self, self.dropout)
        return self.merged(weight)

    def merged(self, weight: Tensor) -> Tensor:
        Q, T = self.directions()
        matrix = precise(weight.flatten(self.layer.batch_dims + 1))
        low = -(T.to(matrix.dtype).mT @ matrix)  # [*batch, rank, in * kernel]
        if self.R is not None:
            low = low + self.scale * self.R.flatten(self.layer.batch_dims + 1)
        return weight + (Q.to(low.dtype) @ low).view(weight.shape)


class DEFT(Method):
    """Decompositional fine-tuning."""

    name = "deft"
    Config = DEFTConfig
    tags = Tags(category="reparameterized", paper="2509.22793", mergeable=True)
    learning_rate = LearningRate(
        1e-3, "MAXNORM8650/DEFT@8efdc0a, examples/sks_dog_run_all.sh", on="OmniGen, a subject of its own"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: DEFTConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, DEFTOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: DEFTConfig) -> int:
        each = site.out_features + (columns(site) if config.injects else 0)
        return math.prod(site.batch) * min(config.rank, site.out_features) * each
