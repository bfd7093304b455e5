"""Base operators of methods for a quantized model. One computes the quantized weight, the other also trains a low-rank
update of it.

    y = Q x + b + s B A x,   Q = round(W - s B0 A0),   W the original weight,   round: pack and unpack by the scheme

`B0 A0` is the part of the weight that the method removes before the weight is quantized; QLoRA removes none. An
operator supports a host in three states, and a saved adapter fits all of them:

* dense: the host contains W, and every forward computes Q from it. Results equal those of the next state, but no memory
  is saved.
* dense, then quantized by `quantize`: the host contains exactly the codes of Q.
* quantized by another library: the host contains round(W), and round(W) - s B0 A0 takes the place of Q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftcore import round_trip
from peftcore.author import MethodConfig, Operator, Site, scheme_key
from peftcore.errors import QuantizationError, UnsupportedSite


class SchemeConfig(MethodConfig):
    """Options of all methods that quantize the model by a scheme."""

    scheme: str = "nf4"
    """The scheme that quantizes the base, as in ``peftcore.quantize(model, scheme)``. A base that is quantized already
    is not changed."""
    scheme_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the scheme, such as ``{"double_quant": True}``."""

    def rounding(self) -> str:
        """Return the scheme and its options as one string, which is an argument of `round_trip`.

        Raises:
            QuantizationError: the scheme is unknown, or its package is missing.
        """
        return scheme_key(self.scheme, self.scheme_options)


class PackedConfig(SchemeConfig):
    """Options of methods with a low-rank update."""

    rank: PositiveInt = 8
    """Rank of the update."""


class Factors(NamedTuple):
    """Low-rank factors: A ``[*batch, rank, in, *kernel]`` and B ``[*batch, out, rank]``."""

    A: Tensor
    B: Tensor


def update_count(site: Site, rank: int) -> int:
    """Return the number of values in both factors."""
    return math.prod(site.batch) * rank * (site.in_features * math.prod(site.kernel) + site.out_features)


def matrices(weight: Tensor, batch_dims: int) -> Tensor:
    """Return a weight ``[*batch, out, in, *kernel]`` as matrices ``[*batch, out, in * kernel]``."""
    return weight.flatten(batch_dims + 1)


def round_weight(rounding: str, weight: Tensor, batch_dims: int) -> Tensor:
    """Return a weight after quantizing and dequantizing it, in its original shape. It is quantized as a matrix ``[out,
    in * kernel]``, in which experts are stacked along the rows.

    Raises:
        UnsupportedSite: the weight does not fit the format.
    """
    flat = matrices(weight, batch_dims).flatten(0, batch_dims)
    try:
        return round_trip(flat, rounding).view(weight.shape)
    except QuantizationError as error:
        raise UnsupportedSite(str(error)) from None


def lora_start(site: Site, rank: int) -> Factors:
    """Return the initial factors of LoRA: A uniform in +-1/sqrt(in * kernel), and B zero."""
    A = torch.zeros(*site.batch, rank, site.in_features, *site.kernel)
    bound = 1 / math.sqrt(site.in_features * math.prod(site.kernel))
    return Factors(nn.init.uniform_(A, -bound, bound), torch.zeros(*site.batch, site.out_features, rank))


class HeldOperator(Operator):
    """Base class of operators that compute the quantized weight of one site. `place` returns the site to install them
    at."""

    def __init__(self, site: Site, config: SchemeConfig) -> None:
        super().__init__(site)
        self.rounding = config.rounding()
        self.simulates = not site.layer.packed
        """Whether the host's weight is dense, so that the operator rounds it."""
        self.packed_for_us = False
        """Whether the host's weight is Q, because peftcore quantized it while the adapter was installed."""

    def base_was_packed(self) -> None:
        self.simulates, self.packed_for_us = False, True

    def rest(self, weight: Tensor) -> Tensor:
        """Return the tensor to round: the weight, minus the part that a method removes from it."""
        return weight

    def base_to_pack(self, weight: Tensor) -> Tensor:
        return self.rest(weight).to(weight.dtype)

    def held(self, weight: Tensor) -> Tensor:
        """Return the quantized weight without the trained update, computed from the weight that the host stores."""
        if self.packed_for_us:
            return weight
        rest = self.rest(weight)
        return round_weight(self.rounding, rest, self.layer.batch_dims) if self.simulates else rest


class PackedBaseOperator(HeldOperator):
    """The low-rank update of one site, in parallel with its quantized weight.

    Args:
        site: the target tensor; see `place`.
        config: rank and scheme.
        start: initial values of A and B.
        taken: the factors B0 and A0 whose product is subtracted from the weight before it is quantized, if any.
        scale: the factor s of the update.
    """

    stackable = True

    A0: Tensor | None
    B0: Tensor | None

    def __init__(
        self, site: Site, config: PackedConfig, start: Factors, taken: Factors | None = None, scale: float = 1.0
    ) -> None:
        super().__init__(site, config)
        self.scale = scale
        self.A, self.B = nn.Parameter(start.A), nn.Parameter(start.B)
        self.register_buffer("A0", None if taken is None else taken.A.clone())
        self.register_buffer("B0", None if taken is None else taken.B.clone())

    def product(self, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
        """Return ``s B A`` in the shape of `weight`."""
        return self.scale * (B @ matrices(A, self.layer.batch_dims)).view(weight.shape)

    def rest(self, weight: Tensor) -> Tensor:
        """Return the weight minus ``s B0 A0``. It is computed in float32 or better, as in a merge, because the
        quantized codes depend on the precision."""
        if self.A0 is None or self.B0 is None:
            return weight
        precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return precise - self.product(self.A0, self.B0, weight)

    def merged(self, weight: Tensor) -> Tensor:
        return self.held(weight) + self.product(self.A, self.B, weight)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Add the update to the output of a quantized linear layer. For all other layers, `merged` changes the
        weight."""
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        y = self.layer.add(y, self.layer.apply(x, A), B, self.scale)
        if self.A0 is None or self.B0 is None or self.packed_for_us:
            return y
        A0, B0 = self.cast(y, self.A0, self.B0)
        return self.layer.add(y, self.layer.apply(x, A0), B0, -self.scale)


def place(site: Site) -> Site:
    """Return the site at which a method installs its operator. The operator changes a dense weight itself, but for a
    quantized weight it changes the output of the module."""
    return site if site.layer.packed else on_weight(site)


def on_weight(site: Site) -> Site:
    """Return the site for an operator that changes only the weight, quantized or not."""
    return replace(site, form="weight")


def group_count(site: Site, group_size: int | None) -> int:
    """Return the number of groups of inputs. In a convolution, each position of the kernel counts as a separate input.

    Raises:
        UnsupportedSite: the number of inputs is not divisible by `group_size`.
    """
    inputs = site.in_features * math.prod(site.kernel)
    if group_size is not None and inputs % group_size:
        raise UnsupportedSite(f"{site.path}: {inputs} inputs are not divisible by group_size={group_size}")
    return 1 if group_size is None else inputs // group_size


def original(site: Site) -> Tensor:
    """Return the site's weight as matrices ``[*batch, out, in * kernel]`` in float32."""
    assert site.in_features, "a vector raises here"
    return matrices(site.weight(), site.layer.batch_dims).float()


def as_factors(site: Site, A: Tensor, B: Tensor, scale: float = 1.0) -> Factors:
    """Return the factors of a matrix, reshaped to factors of the site's weight. Each is divided by the root of `scale`,
    so that ``scale B A`` equals the product of the given factors."""
    root = math.sqrt(scale)
    return Factors(A.reshape(*A.shape[:-1], site.in_features, *site.kernel) / root, B / root)


def principal(matrix: Tensor, rank: int) -> Factors:
    """Return the factors of the best approximation ``B A`` of a matrix ``[*batch, out, in]`` at a given rank. Both
    contain the roots of the singular values. Directions beyond the rank of the matrix are zero. Signs do not depend on
    the machine."""
    if matrix.is_meta:
        return Factors(
            matrix.new_empty(*matrix.shape[:-2], rank, matrix.shape[-1]), matrix.new_empty(*matrix.shape[:-1], rank)
        )
    precise = matrix.double()
    wide = precise.shape[-2] <= precise.shape[-1]
    short = precise if wide else precise.mT  # by the smaller of its two Gram matrices: a fraction of the time
    values, vectors = torch.linalg.eigh(short @ short.mT)
    kept = min(rank, values.shape[-1])
    S = values[..., -kept:].flip(-1).clamp_min(0).sqrt()
    there = 1e-7 * S[..., :1] < S  # below, there is nothing but rounding
    near = vectors[..., -kept:].flip(-1)
    far = (short.mT @ near) * torch.where(there, 1 / S, 0.0).unsqueeze(-2)
    U, V = (near, far) if wide else (far, near)
    sign = U.gather(-2, U.abs().argmax(-2, keepdim=True)).sign()
    root = torch.where(there, S, 0.0).sqrt().unsqueeze(-2)
    A, B = (nn.functional.pad(each * sign * root, (0, rank - kept)) for each in (V, U))
    return Factors(A.mT.contiguous().to(matrix.dtype), B.contiguous().to(matrix.dtype))
