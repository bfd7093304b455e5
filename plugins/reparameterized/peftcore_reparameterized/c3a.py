"""C3A: circular convolution adaptation.   Chen et al. 2024, arXiv 2407.19342 (in peft by its authors).

Equation:
    W' = W + D / in,   D[i, j][p, q] = w[i, j, (q - p) mod b],   w [out / b, in / b, b]

The weight is cut into blocks [b, b], and the update of each is circulant: every row is the row above it, shifted by
one. So a block has b parameters, and yet its rank may be b. The product of a block with inputs is a circular
correlation, which is computed by a Fourier transform. For inputs that are vectors this avoids a matrix of the weight's
size. The addition to an output is

    y[i] = irfft(sum_j conj(rfft(w[i, j])) rfft(x[j])) / in

in float32 at least. The division by the number of inputs is a part of the method, as in peft; so learning rates are a
hundred times those of other methods.

Kernels of convolutions count as inputs (in * kernel), and embeddings count as [dim, num]. b must divide both sides;
near sqrt(in * out) / r there are as many parameters as in a LoRA of rank r. Each expert has separate kernels.

Parameters: in * kernel * out / b a site, times the number of experts.

Start: w uniform in +-sqrt(6 / (in + out)), as in the authors' code and in peft: a fresh adapter changes outputs a
little. ``start="zeros"`` makes it an identity.

Differs from the authors' code: The code in peft, which is by the authors, supports linear layers only. For b above 2
its gradients of the inputs are wrong.

Use it: `peftcore.apply(model, "c3a")`, where the rank of a LoRA limits the quality. It needs as many parameters or
fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, Held, LearningRate, Method, MethodConfig, Site, Surgeon, Tags, WeightOperator
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._basis import columns
from peftcore_reparameterized._rotations import precise


class C3AConfig(MethodConfig):
    """Options of C3A."""

    method: Literal["c3a"] = "c3a"
    block_size: PositiveInt = 256
    """Width b of a block, a divisor of both sides; a larger one has fewer parameters."""
    start: Literal["xavier_uniform", "kaiming_uniform", "gaussian", "zeros"] = "xavier_uniform"
    """The distribution that the kernels are drawn from."""


def started(site: Site, start: str, shape: tuple[int, ...]) -> Tensor:
    """Return the initial kernels w, of the given shape."""
    if start == "zeros":
        return torch.zeros(shape)
    if start == "gaussian":
        return torch.randn(shape)
    inputs = columns(site)
    bound = math.sqrt(6 / (inputs + site.out_features)) if start == "xavier_uniform" else math.sqrt(1 / inputs)
    return torch.empty(shape).uniform_(-bound, bound)


class C3AOperator(WeightOperator):
    """The circulant blocks of one weight's update."""

    def __init__(self, site: Site, config: C3AConfig) -> None:
        super().__init__(site)
        b, out, self.inputs = config.block_size, site.out_features, columns(site)
        if out % b or self.inputs % b:
            raise UnsupportedSite(
                f"{site.path} is {out} x {self.inputs}, which blocks of block_size={b} do not divide; its largest "
                f"is {math.gcd(out, self.inputs)}: set that for this site with overrides=, or exclude the site"
            )
        self.w = nn.Parameter(started(site, config.start, (*site.batch, out // b, self.inputs // b, b)))

    def prefers_activation_form(self, x: Tensor) -> bool:
        return self.layer.of_vectors

    def prepare(self, held: Held) -> Tensor:
        """Return the spectra of the kernels, [out / b, in / b, frequency]."""
        return torch.fft.rfft(precise(self.w)).conj() / self.inputs

    def activation_form(self, call: Callable[..., Tensor], x: Tensor, prepared: Tensor) -> Tensor:
        y, b = call(x), self.w.shape[-1]
        spectra = torch.fft.rfft(x.to(precise(self.w).dtype).unflatten(-1, (-1, b)))  # [..., in / b, frequency]
        blocks = torch.fft.irfft(torch.einsum("...jf,ijf->...if", spectra, prepared), n=b)
        return y + blocks.flatten(-2).to(y.dtype)

    def forward(self, weight: Tensor) -> Tensor:
        place = torch.arange(self.w.shape[-1], device=self.w.device)
        D = self.w[..., (place - place[:, None]) % len(place)]  # [*batch, out / b, in / b, p, q]
        return weight + D.transpose(-3, -2).reshape(weight.shape) / self.inputs


class C3A(Method):
    """Circular convolution adaptation.

    Example:
        injection = peftcore.apply(model, "c3a", block_size=32)  # a divisor of the widths of the model
    """

    name = "c3a"
    Config = C3AConfig
    tags = Tags(
        category="reparameterized",
        paper="2407.19342",
        mergeable=True,
        identity_at_init=False,
        identity_options={"start": "zeros"},
    )
    learning_rate = LearningRate(3e-1, "arXiv 2407.19342, table A6", on="LLaMA2-7B, commonsense")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: C3AConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, C3AOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: C3AConfig) -> int:
        return math.prod(site.batch) * site.out_features * columns(site) // config.block_size
