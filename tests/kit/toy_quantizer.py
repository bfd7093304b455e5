"""A third party's scheme in one file: small integers, one scale a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftcore.author import hookimpl
from peftcore.contract.hookspecs import ForcedAttributes
from peftcore.injection.quantization import Scheme
from peftcore.injection.quantized_layer import QuantizedLayer, quantized_layer_of
from peftcore.layers.layer import Layer

PEFTCORE_API = 2


class Apply(torch.autograd.Function):
    """``x W^T``, with W made again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: ToyLinear) -> Tensor:
        ctx.module = module
        return F.linear(x, module.decode().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.module.gradient(grad), None


class ToyLinear(nn.Module):
    """A linear layer of small integers."""

    layer: ClassVar[QuantizedLayer]
    persistent = True

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype, self.bits = weight.dtype, bits
        scale = weight.detach().float().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        codes = (weight.detach() / scale.clamp_min(1e-30)).round().to(torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale, persistent=self.persistent)
        self.register_parameter("bias", None)

    def decode(self) -> Tensor:
        return (self.codes * self.scale).to(self.dtype)

    def gradient(self, grad: Tensor) -> Tensor:
        return grad @ self.decode().to(grad.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Apply.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@dataclass(frozen=True)
class ToyLayer(QuantizedLayer):
    """How the core reads and packs it."""

    def unpack(self, module: Any) -> Tensor:
        return module.decode()  # type: ignore[no-any-return]

    def dtype(self, module: Any) -> torch.dtype:
        return module.dtype  # type: ignore[no-any-return]

    def pack(self, module: Any, weight: Tensor) -> nn.Module:
        return type(module)(weight.to(module.dtype), module.bits)


ToyLinear.layer = ToyLayer()


class Toy(Scheme):
    """Small integers."""

    layer: ClassVar[QuantizedLayer] = ToyLinear.layer
    linear: ClassVar[type[ToyLinear]] = ToyLinear
    requires: ClassVar[tuple[str, ...]] = ("numpy",)
    extra: ClassVar[str] = "toy-quantizer[numpy]"
    bits: int = Field(default=6, ge=2, le=8)
    """How many."""

    def module(self, weight: Tensor) -> nn.Module:
        return self.linear(weight, self.bits)


@hookimpl
def peftcore_schemes() -> dict[str, str]:
    return {"toy": f"{__name__}:Toy"}


@hookimpl
def peftcore_layer(module: nn.Module, tensor: str) -> Layer | None:
    owner = module.get_submodule(tensor.rpartition(".")[0])
    return quantized_layer_of(module, tensor, owner.layer) if isinstance(owner, ToyLinear) else None


@hookimpl
def peftcore_forced_attributes(cls: type[nn.Module]) -> ForcedAttributes | None:
    return ForcedAttributes({"held": True}) if issubclass(cls, ToyLinear) else None
