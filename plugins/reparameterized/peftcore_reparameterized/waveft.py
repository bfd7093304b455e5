"""WaveFT: an update with sparse wavelet coefficients.   Bilican et al. 2025, arXiv 2505.12532 (Bilican/Sparse_PEFT, in
peft by its authors).

Equation:
    W' = W + alpha sum_j c_j f_j g_j^T,   j = 1 … n

f_j [out] and g_j [in] are two short filters. Each is a low-pass or high-pass filter of the wavelet, shifted by a
position (u_j, v_j). So each coefficient changes a patch of the weight: 2 x 2 entries with db1, the wavelet of Haar, and
2 k x 2 k with db k. The sum is the inverse wavelet transform, with one level in two dimensions, of a matrix that is
zero except for c at the positions. In its upper left quarter f and g are low-pass, in the upper right quarter f is
high-pass, in the lower left one g is, and in the last one both are. Longer filters would need coefficients beyond the
edges. These are zero, and the result is cropped to its middle. With wavelet=None the coefficients are entries of the
update themselves.

The positions depend only on `entry_seed` and the shape. So all sites of one shape have the same positions, and files
contain only c. peft draws the same positions from its `random_loc_seed`. Filters are computed, with a precision of
1e-11.

Kernels of convolutions count as inputs (in * kernel), and embeddings count as [dim, num]. Each expert has a separate c.

Parameters: n a site, times the number of experts, whatever the size of the weight.

Start: c at zero: the identity.

Differs from the authors' code: peft, by the same authors, has tables of filters, including those of Symlets and
Coiflets. It can distribute n over the sites in proportion to their sizes, for which peftcore needs `overrides`. It can
also start from N(0, 0.01).

Use it: `peftcore.apply(model, "waveft")`, instead of FourierFT where adapters must be tiny. Its filters are local, and
a step needs no transform.
"""

from __future__ import annotations

import functools
import math
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Site, Surgeon, Tags, WeightOperator
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._basis import columns, drawn_entries


class WaveFTConfig(MethodConfig):
    """Options of WaveFT."""

    method: Literal["waveft"] = "waveft"
    n_frequency: PositiveInt = 2592
    """Number n of coefficients that are trained at each site."""
    alpha: PositiveFloat = 25.0
    """Factor of the update."""
    wavelet: Annotated[str, Field(pattern="^db([1-9]|10)$")] | None = "db1"
    """Wavelet of Daubechies, db1 to db10. With None, single entries of the weight are changed, which is cheaper."""
    entry_seed: NonNegativeInt = 777
    """Seed of the positions."""


@functools.cache
def low_pass(moments: int) -> Tensor:
    """Return the low-pass filter of Daubechies with `moments` vanishing moments, [2 * moments] in float64. Its
    polynomial has the root -1 once for each moment. Consider the product of the filter with its mirror image: the other
    roots of the filter are the roots of this product inside the unit circle."""
    one = torch.ones(1, dtype=torch.complex128, device="cpu")  # also while planning
    roots = [-one] * moments
    if moments > 1:
        terms = [math.comb(moments - 1 + k, k) for k in range(moments)]  # a polynomial in y = (2 - z - 1 / z) / 4
        companion = torch.diag(one.repeat(moments - 2), -1) if moments > 2 else one[:, None]
        companion[:, -1] = -one.new_tensor(terms[:-1]) / terms[-1]
        for y in torch.linalg.eigvals(companion).unsqueeze(-1):
            z = (1 - 2 * y) - ((1 - 2 * y) ** 2 - 1).sqrt()
            roots.append(z if z.abs() < 1 else 1 / z)
    taps = one
    for root in roots:
        taps = torch.cat([taps, 0 * one]) - root * torch.cat([0 * one, taps])
    return taps.real * (math.sqrt(2) / taps.real.sum())


def waves(places: Tensor, size: int, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors for coefficients at positions along one side of the weight: the entries that they change [n,
    taps], whether these entries are inside the weight, and whether the positions are in the second half."""
    taps = len(low)
    padded = size + taps - 2 + size % 2  # the taps are even
    moved = places + (padded - size) // 2
    start = 2 * (moved % (padded // 2)) - (taps - 2)
    entries = start[:, None] + torch.arange(taps, device=places.device)
    return entries.clamp(0, size - 1), (entries >= 0) & (entries < size), moved >= padded // 2


class WaveFTOperator(WeightOperator):
    """The coefficients of one site's update."""

    entries: Tensor
    weights: Tensor

    def __init__(self, site: Site, config: WaveFTConfig) -> None:
        super().__init__(site)
        self.alpha, out, inputs = config.alpha, site.out_features, columns(site)
        if config.n_frequency > out * inputs:
            raise UnsupportedSite(
                f"{site.path} has {out * inputs} coefficients, fewer than n_frequency={config.n_frequency}; lower it "
                "for this site with overrides=, or exclude the site"
            )
        self.c = nn.Parameter(torch.zeros(*site.batch, config.n_frequency))
        entries = drawn_entries(out * inputs, config.n_frequency, config.entry_seed)[:, None]
        weights = torch.ones_like(entries, dtype=torch.float64)
        if config.wavelet is not None:
            low = low_pass(int(config.wavelet[2:]))
            high = low.flip(0) * low.new_tensor([1, -1]).repeat(len(low) // 2)
            rows, rows_inside, below = waves(entries[:, 0] // inputs, out, low)
            across, across_inside, right = waves(entries[:, 0] % inputs, inputs, low)
            f = torch.where(right[:, None], high, low) * rows_inside  # [n, taps]
            g = torch.where(below[:, None], high, low) * across_inside
            entries = (rows[:, :, None] * inputs + across[:, None]).flatten(1)
            weights = (f[:, :, None] * g[:, None]).flatten(1)
        self.register_buffer("entries", entries.flatten().clone(), persistent=False)  # of [out, in * kernel], in a row
        self.register_buffer("weights", weights, persistent=False)  # [n, entries of one coefficient]

    def forward(self, weight: Tensor) -> Tensor:
        c = self.c.to(torch.promote_types(self.c.dtype, torch.float32))
        values = (self.alpha * c.unsqueeze(-1) * self.weights.to(c.dtype)).flatten(-2)
        matrix = weight.flatten(self.layer.batch_dims)  # [*batch, out * in * kernel]
        delta = torch.zeros(matrix.shape, dtype=c.dtype, device=c.device).index_add(-1, self.entries, values)
        return weight + delta.view(weight.shape)


class WaveFT(Method):
    """Updates in the wavelet domain."""

    name = "waveft"
    Config = WaveFTConfig
    tags = Tags(category="reparameterized", paper="2505.12532", mergeable=True)
    learning_rate = LearningRate(
        1e-4,
        "Bilican/Sparse_PEFT@a2f5e61, example_outputs/config/dog/final_model/training_config.yaml",
        on="Stable Diffusion XL, DreamBooth",
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: WaveFTConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, WaveFTOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: WaveFTConfig) -> int:
        return math.prod(site.batch) * config.n_frequency
