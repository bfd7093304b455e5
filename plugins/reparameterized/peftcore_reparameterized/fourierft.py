"""FourierFT: an update with a sparse Fourier spectrum.   Gao et al. 2024, arXiv 2405.03003.

Equation:
    W' = W + alpha Re(ifft2(F)),   F [out, in] zero except for n trained entries c

    delta[p, q] = alpha / (out in) sum_j c_j cos(2 pi (u_j p / out + v_j q / in))

The positions (u_j, v_j) depend only on `entry_seed` and the shape. So all sites of one shape have the same positions,
and files contain only c. peft draws the same positions from its `random_loc_seed`. In convolutions q counts the inputs
at all positions of the kernel. Each stacked expert has a separate F.

Parameters: n a site, times the number of experts, whatever the size of the weight.

Start: c from N(0, `init_std`): a fresh adapter changes outputs, as in the authors' code and in peft. ``init_std=0``
makes it an identity. The expected norm of the fresh update is ``alpha init_std sqrt(n / 2) / sqrt(out in)``. In narrow
models the update is larger, while the norms of the weights are smaller. `apply` reports an update whose norm is more
than `LARGE` times that of the weight.

Differs from the authors' code: The authors' code supports only square weights, and applies the transpose of this
update. The defaults are those of peft. In the authors' scripts (Chaos96/fourierft) `alpha` is 29 to 151 for RoBERTa and
300 for Llama and ViT, all of 768 inputs or more. peft computes in float32 whatever the dtype is; peftcore computes
float64 weights in float64.

Use it: `peftcore.apply(model, "fourierft")`, where adapters must be tiny. Until the adapter is merged, each forward
computes a Fourier transform of the weight's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Site, Surgeon, Tags, WeightOperator
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._basis import drawn_entries


class FourierFTConfig(MethodConfig):
    """Options of FourierFT."""

    method: Literal["fourierft"] = "fourierft"
    n_frequency: PositiveInt = 1000
    """Number n of spectral entries that are trained at each site."""
    alpha: PositiveFloat = 150.0
    """Factor of the update. A larger factor needs a smaller learning rate."""
    entry_seed: NonNegativeInt = 777
    """Seed of the positions in the spectrum."""
    init_std: NonNegativeFloat = 1.0
    """Standard deviation of the initial entries. With 0 a fresh adapter leaves outputs unchanged."""


LARGE = 0.5
"""Ratio of the norm of a fresh update to that of its weight. `apply` reports an update with a larger ratio."""


class FourierFTOperator(WeightOperator):
    """The spectrum of one site's update."""

    entries: Tensor

    def __init__(self, site: Site, config: FourierFTConfig) -> None:
        super().__init__(site)
        self.alpha = config.alpha
        size = site.out_features * site.in_features * math.prod(site.kernel)
        if config.n_frequency > size:
            raise UnsupportedSite(
                f"{site.path} has {size} entries in its spectrum, fewer than n_frequency={config.n_frequency}; "
                "lower it for this site with overrides=, or exclude the site"
            )
        self.c = nn.Parameter(torch.randn(*site.batch, config.n_frequency) * config.init_std)
        entries = drawn_entries(size, config.n_frequency, config.entry_seed).clone()
        self.register_buffer("entries", entries, persistent=False)  # row after row of [out, in * kernel]

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(self.layer.batch_dims + 1)  # [*batch, out, in * kernel]
        c = self.c.to(torch.promote_types(self.c.dtype, torch.float32))  # half precision has no transform
        spectrum = c.new_zeros(*c.shape[:-1], math.prod(matrix.shape[-2:])).index_copy(-1, self.entries, c)
        delta = torch.fft.ifft2(spectrum.unflatten(-1, matrix.shape[-2:])).real
        return weight + self.alpha * delta.reshape(weight.shape)


def relative_size(site: Site, config: FourierFTConfig) -> float:
    """Return the expected norm of a site's fresh update, relative to the norm of its weight; 0 if the weight has no
    values yet."""
    weight = site.base_weight()
    norm = 0.0 if weight.is_meta else weight.float().norm().item()
    expected = config.alpha * config.init_std * math.sqrt(math.prod(site.batch) * config.n_frequency / 2)
    return expected / math.sqrt(weight.numel() / math.prod(site.batch)) / norm if norm else 0.0


def _too_large(sites: Iterable[Site], config: FourierFTConfig) -> Iterator[str]:
    """Yield a notice about the site with the largest relative size of its fresh update, if that is above `LARGE`."""
    sizes = {site.path: relative_size(site, config.at(site.path)) for site in sites}
    path = max(sizes, key=sizes.__getitem__, default="")
    if path and sizes[path] > LARGE:
        alpha = config.at(path).alpha
        yield (
            f"fourierft with alpha={alpha:g} starts with a change of {path} that is {sizes[path]:.2g} times as large "
            f"as its weight; alpha={alpha * LARGE / sizes[path]:.2g} makes it {LARGE:g} times, init_std=0 none"
        )


class FourierFT(Method):
    """Updates in the Fourier domain."""

    name = "fourierft"
    Config = FourierFTConfig
    tags = Tags(
        category="reparameterized",
        paper="2405.03003",
        mergeable=True,
        identity_at_init=False,
        identity_options={"init_std": 0.0},
    )
    learning_rate = LearningRate(
        5e-2, "Chaos96/fourierft@4986a28, experiments/GLUE/sst2-base-best.sh", on="RoBERTa-base, SST-2"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: FourierFTConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        for site in sites:
            surgeon.graft(site, FourierFTOperator, config)
        surgeon.notices += _too_large(sites, config)

    @staticmethod
    def parameter_count(site: Site, config: FourierFTConfig) -> int:
        return math.prod(site.batch) * config.n_frequency
