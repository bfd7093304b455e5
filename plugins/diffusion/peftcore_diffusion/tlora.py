"""T-LoRA: a rank that falls with the noise.   Soboleva et al. 2025, arXiv 2507.05964 (ControlGenAI/T-LoRA).

Equation:
    y = W x + b + s (B M diag(l) A x - B0 M diag(l0) A0 x),   M = diag(1, ..., 1, 0, ..., 0)
    M has r(t) ones,   r(t) = floor(((T - t) / T)^p (rank - min_rank)) + min_rank

At a timestep t near T, where an image is mostly noise, few ranks act; at t = 0 all ranks act. At high noise an update
of full rank would memorise the few training pictures. t is the host's argument ``timestep``, one value for each row of
the batch, in training and in inference. If the host lacks that argument, pass t to a call: ``with peftcore.call(model,
timestep=t): ...``.

A is [rank, in], B [out, rank], l [rank]; A0, B0 and l0 are frozen copies of the start values. With start="random", A
and B start as random orthonormal matrices, and l as singular values of a random matrix N(0, 1 / rank) of the weight's
shape, by default the smallest ones (`part`). With start="weight", A, B and l start as singular vectors and values of
the weight itself, as in LyCORIS by default. start="zero" is the authors' vanilla T-LoRA: a masked LoRA without l, with
A ~ N(0, 1 / rank) and B at zero. s is 1, or alpha / rank if `alpha` is set, as in files of LyCORIS.

In convolutions A is [rank, in, *kernel]. If the rank of a weight is less than `rank`, the first entries of the mask are
used. T-LoRA files of LyCORIS are loaded as the method `pissa`, in which all ranks act, as in LyCORIS. T-LoRA cannot be
merged.

Parameters: rank * (in * kernel + out + 1) a site; with start="zero" without the 1.

Start: A has orthonormal rows, B has orthonormal columns, and l contains singular values, so that all ranks differ. The
product of the frozen copies is subtracted, so the start is an identity.

Differs from the authors' code: The authors compute A and B by decomposing the random matrix, and use rows instead of
columns; the distribution is the same. Their code has no scale. In LyCORIS the kernels of all factors have one point.

Use it: `peftcore.apply(model, "tlora")`, to learn a subject from one picture; not to learn a style from many pictures,
where LoRA learns more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_diffusion._told import timesteps


class TLoRAConfig(MethodConfig):
    """Options of T-LoRA."""

    method: Literal["tlora"] = "tlora"
    rank: PositiveInt = 64
    """Rank of the update at the timestep 0; at most that of the weight."""
    min_rank: PositiveInt = 32
    """Rank at the last timestep."""
    alpha: PositiveFloat | None = None
    """Numerator of the scale ``alpha / rank``; None leaves the update unscaled."""
    power: PositiveFloat = 1.0
    """Exponent p of the decrease: with values above 1 fewer ranks act at the timesteps between the first and the
    last."""
    timesteps: PositiveFloat = 1000.0
    """The largest timestep T, at which an image is only noise: 1000 for most schedules, 1 for hosts whose timesteps are
    in 0 .. 1."""
    start: Literal["random", "weight", "zero"] = "random"
    """The start of the factors: random orthonormal matrices ("random"), singular vectors and values of the weight
    ("weight"), or as in LoRA ("zero")."""
    part: Literal["last", "principal", "middle"] = "last"
    """The singular values with which l starts: the smallest, the largest, or those in the middle. If an odd number of
    values is left out around the middle, one more of the larger values is left out than of the smaller values. LyCORIS
    leaves out one more of the smaller values."""

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.min_rank > self.rank:
            raise ValueError(f"min_rank={self.min_rank} is larger than rank={self.rank}; set at most rank")
        return self


class TLoRAOperator(Operator):
    """The update of one site."""

    values: nn.Parameter | None
    """The trained vector l; with start="zero" it is None, like A0, B0 and l0."""
    A0: Tensor | None
    B0: Tensor | None
    values0: Tensor | None

    def __init__(self, site: Site, config: TLoRAConfig) -> None:
        """Make the factors.

        Raises:
            UnsupportedSite: the host reads the weight without calling its module.
        """
        super().__init__(site)
        if site.form != "activation":
            raise UnsupportedSite(
                f"{site.path} is read as a weight, not called, so its input has no timesteps; exclude it"
            )
        self.scale = 1.0 if config.alpha is None else config.alpha / config.rank
        self.power, self.timesteps = config.power, config.timesteps
        self.rank, self.min_rank = config.rank, config.min_rank
        self.A, self.B, self.values = (nn.Parameter(each) for each in _start(site, config))
        for name, own in (("A0", self.A), ("B0", self.B), ("values0", self.values)):
            self.register_buffer(name, None if config.start == "zero" else own.detach().clone())
        if config.start == "zero":
            self.values = None

    def mask(self, low: Tensor) -> Tensor:
        """Return the diagonal of M for each row of the batch, [rows, rank], with further dimensions to be multiplied
        with `low`, which is A x."""
        t = timesteps(len(low), low.device).double()
        share = ((self.timesteps - t) / self.timesteps).clamp(min=0) ** self.power
        acting = (share * (self.rank - self.min_rank)).floor() + self.min_rank
        mask = (torch.arange(self.B.shape[-1], device=low.device) < acting[:, None]).to(low.dtype)
        shape = [len(low), *[1] * (low.dim() - 1)]
        shape[self.layer.channel_dim] = -1
        return mask.view(shape)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of factors [rank, in, *kernel] and [out, rank] whose products add up to the update. If the start
        values are subtracted, the sum is ``B (l A - l0 A0) + (B - B0) l0 A0``, which is exactly zero at the start."""
        if self.values is None or self.A0 is None or self.B0 is None or self.values0 is None:  # start="zero"
            return [(self.A, self.B)]
        ones = [1] * (self.A.dim() - 1)
        A, A0 = self.values.view(-1, *ones) * self.A, self.values0.view(-1, *ones) * self.A0
        return [(A - A0, self.B), (A0, self.B - self.B0)]

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        for A, B in self.pairs():
            A, B = self.cast(y, A, B)
            low = self.layer.apply(x, A)
            y = y + self.layer.mix(self.scale * low * self.mask(low), B)
        return y


def _start(site: Site, config: TLoRAConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return the start values of A, B and l."""
    inputs, outputs = site.in_features * math.prod(site.kernel), site.out_features
    rank = min(config.rank, inputs, outputs)
    if config.start == "zero":
        A, B, values = torch.randn(rank, inputs) / rank, torch.zeros(outputs, rank), torch.ones(rank)
    elif config.start == "weight":
        weight = site.weight().detach().reshape(outputs, inputs)
        U, S, V = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        chosen = _part(len(S), rank, config.part)
        A, B, values = V[chosen], U[:, chosen], S[chosen]
    else:
        S = torch.linalg.svdvals(torch.randn(outputs, inputs) / rank)
        A, B = (torch.linalg.qr(torch.randn(size, rank)).Q for size in (inputs, outputs))
        A, values = A.mT, S[_part(len(S), rank, config.part)]
    return A.reshape(rank, site.in_features, *site.kernel).contiguous(), B.contiguous(), values


def _part(of: int, rank: int, part: str) -> slice:
    first = {"principal": 0, "middle": (of - rank + 1) // 2, "last": of - rank}[part]
    return slice(first, first + rank)


class TLoRA(Method):
    """Low-rank adaptation with a rank that depends on the timestep.

    Example:
        injection = peftcore.apply(model, "tlora", rank=8, min_rank=4)
        peftcore.call(model, timestep=500)  # only if the model has no argument timestep
    """

    name = "tlora"
    Config = TLoRAConfig
    tags = Tags(category="diffusion", paper="2507.05964")
    learning_rate = LearningRate(1e-4, "ControlGenAI/T-LoRA@602c4f7, train.py", on="SDXL, DreamBooth")
    target = ("attn.q", "attn.k", "attn.v", "attn.out", "cross.q", "cross.k", "cross.v", "cross.out")
    alternatives = MATRICES
    config_version = 2
    former_defaults = ({"alpha": 64.0},)

    def inject(self, model: nn.Module, config: TLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, TLoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: TLoRAConfig) -> int:
        inputs = site.in_features * math.prod(site.kernel)
        rank = min(config.rank, inputs, site.out_features)
        return rank * (inputs + site.out_features + (config.start != "zero"))
