"""The kinds of layer: linear, transposed, embedding, convolution, transposed convolution, and layers whose weights
cannot be read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from peftcore.errors import UnsupportedSite
from peftcore.layers import kernels
from peftcore.layers.layer import Layer

SMALL = 2**14
"""Outputs with at most this many values are computed without a fused kernel, which would not save time."""
DENSE = (Tensor, nn.Parameter)
"""The classes of plain tensors."""


@dataclass(frozen=True)
class Linear(Layer):
    """``y = W x`` over the last dimension."""

    fuses_updates: ClassVar[bool] = True
    of_vectors: ClassVar[bool] = True

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def apply_dropped(self, x: Tensor, weight: Tensor, probability: float) -> Tensor:
        return kernels.dropped_linear(x, weight, probability) if probability else self.apply(x, weight)

    def mix(self, low: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(low, matrix)

    def update(
        self, call: Callable[..., Tensor], x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
    ) -> Tensor:
        own = self.frozen_linear(call, x, B.shape[-2])
        if own is not None and A.dim() == B.dim() == 2:
            return kernels.low_rank_linear(x, *own, A, B, scale, dropout)
        y = call(x)
        if A.dtype is B.dtype is y.dtype and not dropout and not is_compiling() and y.numel() <= SMALL:
            return torch.add(y, F.linear(F.linear(x, A), B), alpha=scale)  # a token: each call counts
        A, B = A.to(y.dtype), B.to(y.dtype)
        return self.add(y, self.apply_dropped(x, A, dropout), B, scale)

    def frozen_linear(self, call: Callable[..., Tensor], x: Tensor, width: int) -> tuple[Tensor, Tensor | None] | None:
        enough = torch.is_grad_enabled() if is_compiling() else x.numel() * width > SMALL * x.shape[-1]
        if not enough or kernels.runs_plain(x) or not is_linear(call):
            return None
        module: nn.Linear = call.args[0]  # type: ignore[attr-defined]
        weight, bias = module.weight, module.bias
        plain = all(each is None or (type(each) in DENSE and not each.requires_grad) for each in (weight, bias))
        return (self.logical(weight), bias) if plain else None

    def add(self, y: Tensor, low: Tensor, matrix: Tensor, scale: float) -> Tensor:
        if is_compiling():  # inductor loses `alpha` where it makes one of a sum and a product (pytorch issue 167313)
            return y + F.linear(low * scale, matrix)
        if y.numel() <= SMALL:
            return torch.add(y, F.linear(low, matrix), alpha=scale)
        flat = torch.addmm(y.reshape(-1, y.shape[-1]), low.reshape(-1, low.shape[-1]), matrix.T, alpha=scale)
        return flat.view(y.shape)


PRODUCTS: set[Callable[..., Any]] = {nn.Linear.forward}
"""Forward functions that only multiply by the weight and add the bias (`detect` adds one of transformers)."""


def is_linear(call: Callable[..., Any]) -> bool:
    """Whether `call` is a linear layer's own forward with its own weight, so that its output is a new tensor without
    other references."""
    return type(call) is functools.partial and call.func in PRODUCTS


@dataclass(frozen=True)
class Opaque(Linear):
    """A linear layer whose weight cannot be read: its module can only be called."""

    def check_readable(self, module: nn.Module, tensor: str) -> None:
        held = super().read(module, tensor)
        kind = "no tensor" if held is None else f"{type(held).__name__} of {held.dtype}".replace("torch.", "")
        raise UnsupportedSite(
            f"{tensor!r} of {type(module).__name__} is stored as {kind}, which no installed plugin can read, and this "
            "needs the weight itself. Use a method that adds to the layer's output, such as lora, or a plugin that "
            "reads the weight: peftcore-quantized reads bitsandbytes, torchao and HQQ; for another format, write a "
            "plugin with the hook peftcore_layer"
        )

    def read(self, module: nn.Module, tensor: str) -> Tensor | None:
        self.check_readable(module, tensor)
        return None

    def has(self, module: nn.Module, tensor: str) -> bool:
        return True

    def like(self, module: nn.Module, tensor: str) -> Tensor:
        floats = (each for each in (*module.parameters(), *module.buffers()) if each.is_floating_point())
        return next(floats, torch.empty(0, device=next(module.parameters()).device))

    def shape(self, module: nn.Module, tensor: str) -> torch.Size:
        features = getattr(module, "out_features", None), getattr(module, "in_features", None)
        return torch.Size(features) if all(features) else self.logical(self.read(module, tensor)).shape  # type: ignore[arg-type]


@dataclass(frozen=True)
class Transposed(Linear):
    """A weight stored ``[*batch, in, out]``: transformers' Conv1D, experts of some mixtures."""

    def logical(self, stored: Tensor) -> Tensor:
        return stored.mT

    def stored(self, logical: Tensor) -> Tensor:
        return logical.mT


@dataclass(frozen=True)
class Table(Transposed):
    """An embedding ``[num, dim]``: a linear map from one-hot inputs, so its logical weight is ``[dim, num]``."""

    fuses_updates: ClassVar[bool] = False
    of_vectors: ClassVar[bool] = False
    padding_idx: int | None = None
    update, frozen_linear = Layer.update, Layer.frozen_linear

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight.mT, padding_idx=self.padding_idx)


@dataclass(frozen=True)
class Conv(Layer):
    """A convolution ``[out, in / groups, *kernel]`` over channels-first activations."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()

    @property
    def channel_dim(self) -> int:
        return -1 - len(self.stride)

    def _conv(self, x: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        conv: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        return conv(x, weight, **kwargs)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv(x, weight, stride=self.stride, padding=self.padding, dilation=self.dilation)

    def mix(self, low: Tensor, matrix: Tensor) -> Tensor:
        return self._conv(low, matrix.view(*matrix.shape, *[1] * len(self.stride)))

    def add(self, y: Tensor, low: Tensor, matrix: Tensor, scale: float) -> Tensor:
        return y + self.mix(low * scale, matrix)

    def along_channels(self, vector: Tensor, like: Tensor) -> Tensor:
        return vector.view(-1, *[1] * len(self.stride))


@dataclass(frozen=True)
class ConvTransposed(Layer):
    """A transposed convolution, stored ``[in, out / groups, *kernel]``; logical ``[out, in / groups, *kernel]``."""

    groups: int = 1

    def _swap(self, weight: Tensor) -> Tensor:
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])  # [groups, a, b, *kernel]
        return grouped.transpose(1, 2).flatten(0, 1)

    def logical(self, stored: Tensor) -> Tensor:
        return self._swap(stored)

    def shape(self, module: nn.Module, tensor: str) -> torch.Size:
        stored = self.read(module, tensor)
        assert stored is not None, "only existing tensors have a shape"
        return self.logical(stored.detach().to("meta")).shape  # in groups the layout is a copy

    def stored(self, logical: Tensor) -> Tensor:
        return self._swap(logical)
