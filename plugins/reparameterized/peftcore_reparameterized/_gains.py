"""Gains of the outputs of a weight."""

from __future__ import annotations

from torch import Tensor

from peftcore.author import Layer
from peftcore_reparameterized._kernels import add_scaled


def with_gains(weight: Tensor, gain: Tensor) -> Tensor:
    """Return a weight [*batch, out, in, *kernel] whose rows are scaled by gains [*batch, out]."""
    return weight * gain.view(*gain.shape, *[1] * (weight.dim() - gain.dim()))


def gained(layer: Layer, y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``gain (y - bias) + bias``, where y is the output of a layer. This is the output after the rows of the
    layer's weight, but not its bias, are scaled by gains [out]."""
    gain = layer.along_channels(gain.to(y.dtype), y)
    if bias is None:
        return y * gain
    shift = layer.along_channels(bias.to(y.dtype), y)
    return add_scaled(shift, gain, y - shift)
