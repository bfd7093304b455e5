"""HQQ (half-quadratic quantization): the schemes hqq-8 and hqq-4, and reading of any other `HQQLinear`."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore import Scheme
from peftcore.author import Layer, QuantizedLayer, hookimpl, quantized_layer_of
from peftcore.errors import QuantizationError

PEFTCORE_API = 2


@functools.cache
def _linear() -> Any:
    """Return a subclass of `HQQLinear` that loads its bias as a parameter. The class of HQQ loads it as a plain
    tensor."""
    from hqq.core.quantize import HQQLinear

    def load(self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        bias = state_dict.get(f"{prefix}bias")
        if bias is not None:
            state_dict[f"{prefix}bias"] = nn.Parameter(bias, requires_grad=False)
        HQQLinear._load_from_state_dict(self, state_dict, prefix, *rest)

    members = {"_load_from_state_dict": load, "__module__": __name__, "__doc__": HQQLinear.__doc__}
    return type("HQQLinear", (HQQLinear,), members)


def __getattr__(name: str) -> Any:
    """Return the subclass of `HQQLinear`, which pickled modules refer to as an attribute of this module."""
    if name == "HQQLinear":
        return _linear()
    raise AttributeError(name)


@torch.no_grad()
def _packed(weight: Tensor, config: dict[str, Any]) -> Any:
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    module = _linear()(dense, config, compute_dtype=weight.dtype, device=str(weight.device))
    del module.bias  # an attribute, which would hide the parameter
    module.register_parameter("bias", None)
    return module


@dataclass(frozen=True)
class HQQLayer(QuantizedLayer):
    """Reads and quantizes `HQQLinear` for the core."""

    def unpack(self, module: Any) -> Tensor:
        return module.dequantize()

    def dtype(self, module: Any) -> torch.dtype | None:
        return module.compute_dtype

    def pack(self, module: Any, weight: Tensor) -> nn.Module:
        return _packed(weight.to(module.compute_dtype), {**module.quant_config, "offload_meta": module.offload_meta})


class HQQ8(Scheme):
    """The scheme of HQQ in 8 bits."""

    layer: ClassVar[QuantizedLayer] = HQQLayer()
    requires: ClassVar[tuple[str, ...]] = ("hqq",)
    extra: ClassVar[str] = "peftcore-quantized[hqq]"
    bits: ClassVar[int] = 8
    group_size: PositiveInt = 64
    """Number of weights of a row that share a scale and a zero; it must divide the number of weights."""

    def module(self, weight: Tensor) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig

        if weight.numel() % self.group_size:
            raise QuantizationError(f"hqq: {tuple(weight.shape)} is not divisible by group_size={self.group_size}")
        groups, share = weight.numel() // self.group_size, 8 // self.bits
        if groups % share:
            raise QuantizationError(f"hqq: the {groups} groups of {tuple(weight.shape)} are not divisible by {share}")
        return _packed(weight, BaseQuantizeConfig(nbits=self.bits, group_size=self.group_size, axis=1))


class HQQ4(HQQ8):
    """The scheme of HQQ in 4 bits."""

    bits: ClassVar[int] = 4


@hookimpl
def peftcore_schemes() -> dict[str, str]:
    """Map the names of the schemes to their import paths."""
    return {"hqq-8": f"{__name__}:HQQ8", "hqq-4": f"{__name__}:HQQ4"}


@hookimpl
def peftcore_layer(module: nn.Module, tensor: str) -> Layer | None:
    """Return the layer of a module that HQQ has quantized, else None. This function does not import HQQ. If it is not
    imported elsewhere, the module cannot be an HQQ layer."""
    hqq = sys.modules.get("hqq.core.quantize")
    owner = module.get_submodule(tensor.rpartition(".")[0])
    return (
        quantized_layer_of(module, tensor, HQQ8.layer) if hqq is not None and isinstance(owner, hqq.HQQLinear) else None
    )
