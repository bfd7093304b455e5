"""Helpers of orthogonal methods: the side of a weight that is rotated, skew-symmetric matrices, and rotation in
blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftcore.author import Layer, Site
from peftcore.errors import UnsupportedSite


def width(site: Site, outputs: bool = False) -> int:
    """Return the number of coordinates that are rotated: the inputs of one output (in * kernel), the outputs, or the
    features of an embedding.

    The inputs of an embedding are tokens, which no rotation should mix.
    """
    return site.out_features if outputs or site.layer.one_hot else site.in_features * math.prod(site.kernel)


def rows(weight: Tensor, layer: Layer, outputs: bool = False) -> Tensor:
    """Return the weight [*batch, out, in, *kernel] as rows [*batch, n, width] of the rotated side, in float32 or
    better."""
    flat = precise(weight).flatten(layer.batch_dims + 1)
    return flat.mT if outputs or layer.one_hot else flat


def weight_of(rows: Tensor, layer: Layer, shape: torch.Size, outputs: bool = False) -> Tensor:
    """Return the weight in its original `shape`, from the result of `rows`."""
    return (rows.mT if outputs or layer.one_hot else rows).reshape(shape)


def block_size(site: Site, wanted: int, factors: int = 1, outputs: bool = False) -> int:
    """Return the width of a block that is nearest to the wanted one and divides the rotated side evenly, for a
    butterfly of `factors` factors. Of two widths that are equally near, the smaller one is returned.

    Raises:
        UnsupportedSite: no block width up to twice the wanted one divides the side evenly, or the tensor is a vector.
    """
    if len(site.weight_shape) == site.layer.batch_dims + 1:
        raise UnsupportedSite(f"{site.path} is a vector, and only a matrix can be rotated; exclude it")
    turned = width(site, outputs)
    halves = 2 ** min(factors - 1, turned.bit_length())  # a factor joins halves of blocks across a doubled distance
    even = 1 if factors == 1 else 2
    fitting = [n for n in range(2, min(2 * wanted, turned) + 1) if n % even == 0 and turned % (n * halves) == 0]
    if not fitting:
        raise UnsupportedSite(
            f"{site.path} rotates {turned} coordinates, which no block width from 2 to {2 * wanted} divides; exclude "
            "it, or set other options for it with overrides="
        )
    return min(fitting, key=lambda n: (abs(n - wanted), n))


def within(entries: Tensor, limit: float, times: int) -> Tensor:
    """Return entries above the diagonals of skew-symmetric blocks, [*batch, blocks, entries], scaled down so that the
    norm of all blocks together is at most `limit`. Each block counts `times` times."""
    norm = math.sqrt(2 * times) * torch.linalg.vector_norm(entries, dim=(-2, -1), keepdim=True)
    return entries * (limit / norm.clamp(min=limit))


def each_within(entries: Tensor, radius: float) -> Tensor:
    """Return entries as `within` does, but with the norm of each block at most `radius`. Backward treats the scaling as
    the identity."""
    norm = math.sqrt(2) * torch.linalg.vector_norm(entries, dim=-1, keepdim=True)
    return entries + (entries * (radius / norm.clamp(min=radius)) - entries).detach()


def precise(values: Tensor) -> Tensor:
    """Return the parameters of rotations, cast to float32 or better."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def rotate(rows: Tensor, R: Tensor) -> Tensor:
    """Multiply rows [*batch, n, width] by the transpose of a block-diagonal matrix R [*batch, blocks, size, size]; a
    single block is used for all."""
    dtype = torch.promote_types(rows.dtype, R.dtype)
    parts = rows.to(dtype).unflatten(-1, (-1, R.shape[-1]))  # [*batch, n, blocks, size]
    turned = parts.transpose(-3, -2) @ R.to(dtype).mT  # [*batch, blocks, n, size]
    return turned.transpose(-3, -2).flatten(-2)
