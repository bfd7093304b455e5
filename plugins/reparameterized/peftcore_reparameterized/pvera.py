"""PVeRA: probabilistic VeRA.   Fillioux et al. 2025, arXiv 2512.07703 (leofillioux/pvera; in peft by its authors).

Equation:
    y = W x + b + diag(b) B z,   [mu; logvar] = diag(d) A dropout(x),   d [2 rank],   b [out]
    z = mu + exp(logvar / 2) eps,   eps ~ N(0, 1), in training; z = mu otherwise

As in VeRA, A [2 rank, in] and B [out, rank] are random and frozen. All sites share them, and each uses the top-left
corner of its own size. They are drawn from `projection_seed` in the same way as in peft, and files contain them only
with `store_basis`. With sample="always", z is drawn in evaluation too, so that several forwards show the uncertainty of
the model. A merge uses the mean. So does a tensor that another module reads, even in training, because there are no
activations to draw. With sample="never", the output is that of VeRA with half of A.

`kl` is the factor of an additional loss: the divergence of z from N(0, 1) at each site, averaged over all activations
of tokens that are not padding.

Kernels of convolutions count as columns, [2 rank, in * kernel]. Each expert has separate vectors.

Parameters: 2 rank + out a site, times the number of experts.

Start: d at `d_initial`, b at zero: the identity.

Differs from the authors' code: In the authors' code, all entries of d start at the same random number, and the update
is multiplied by 16. Its `kl` is 1e-6 to 1e-16, depending on the data set. peft, by the same authors, lacks `kl` and
supports linear layers only.

Use it: `peftcore.apply(model, "pvera")`, where VeRA is suitable and data is scarce, or to measure the uncertainty of
the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
    by_row,
    forward_context,
)
from peftcore_reparameterized._basis import columns, graft_between
from peftcore_reparameterized._low_rank import add_low_rank, input_dropout
from peftcore_reparameterized.vera import draw


class PVeRAConfig(MethodConfig):
    """Options of PVeRA."""

    method: Literal["pvera"] = "pvera"
    rank: PositiveInt = 256
    """Number of rows of A for the mean, of rows of A for the variance, and of columns of B."""
    d_initial: PositiveFloat = 0.1
    """Initial value of all entries of d."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    sample: Literal["never", "training", "always"] = "training"
    """When z is drawn. At other times z is the mean."""
    kl: NonNegativeFloat = 0.0
    """Factor of the divergence of z from a standard normal distribution, as a loss in training."""
    projection_seed: NonNegativeInt = 0
    """Seed of A and B."""
    store_basis: bool = False
    """Save the random matrices in files, which grow by their size. Matrices loaded from another library's file are
    always saved."""


class PVeRAOperator(Operator):
    """The trained vectors of one site, and a reference to the matrices that all sites share."""

    def __init__(self, site: Site, config: PVeRAConfig, basis: Shared) -> None:
        super().__init__(site)
        self.basis, self.rank, self.kl = basis, config.rank, config.kl
        self.always, self.noise = config.sample == "always", 0.0 if config.sample == "never" else 1.0
        self.dropout = input_dropout(site, config.dropout)
        self.inputs, self.columns = (site.in_features, *site.kernel), columns(site)
        self.d = nn.Parameter(torch.full((*site.batch, 2 * config.rank), config.d_initial))
        self.b = nn.Parameter(torch.zeros(*site.batch, site.out_features))

    def corners(self) -> tuple[Tensor, Tensor]:
        """Return A [2 rank, in * kernel] and B [out, rank] of this site."""
        return self.basis.module.A[:, : self.columns], self.basis.module.B[: self.b.shape[-1]]

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y, (A, B), layer = call(x), self.corners(), self.layer
        A, B, d, b = self.cast(y, A.unflatten(-1, self.inputs), B, self.d, self.b)
        with_variance = self.training or self.always
        if not with_variance:
            A, d = A[: self.rank], d[: self.rank]
        low = layer.apply_dropped(x, A, self.dropout if self.training else 0.0)
        low = low * layer.along_channels(d, low)
        mean = low.narrow(layer.channel_dim, 0, self.rank)
        if with_variance:
            log_variance = low.narrow(layer.channel_dim, self.rank, self.rank)
            if self.training and self.kl:
                forward_context().add_loss(self.kl * self.divergence(mean, log_variance), self)
            if self.noise:
                mean = mean + self.noise * torch.randn_like(mean) * (log_variance / 2).exp()
        return y + layer.along_channels(b, y) * layer.mix(mean, B)

    def divergence(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Return the mean divergence from N(0, 1), over all activations of tokens that are not padding."""
        each = self.layer.channels_last(mean.square() + log_variance.exp() - 1 - log_variance) / 2
        values, counts, _ = by_row(each.to(torch.promote_types(each.dtype, torch.float32)))
        counted = torch.ones_like(values[..., 0]) if counts is None else counts.to(values.dtype)
        mean_divergence: Tensor = (values.mean(-1) * counted).sum() / counted.sum().clamp(min=1)
        return mean_divergence

    def merged(self, weight: Tensor) -> Tensor:
        A, B = (each.to(self.d) for each in self.corners())
        scaled = (self.d.unsqueeze(-1) * A)[..., : self.rank, :].unflatten(-1, self.inputs)
        return add_low_rank(weight, scaled, self.b.unsqueeze(-1) * B)


class PVeRA(Method):
    """VeRA with activations that are drawn from a learned distribution."""

    name = "pvera"
    Config = PVeRAConfig
    tags = Tags(category="reparameterized", paper="2512.07703", mergeable=True, random=True)
    learning_rate = LearningRate(1e-3, "leofillioux/pvera@25a3baa, config/adapters.yaml", on="ViT, VTAB-1k")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: PVeRAConfig, surgeon: Surgeon) -> None:
        graft_between(surgeon, config, PVeRAOperator, draw, 2)

    @staticmethod
    def parameter_count(site: Site, config: PVeRAConfig) -> int:
        return math.prod(site.batch) * (2 * config.rank + site.out_features)
