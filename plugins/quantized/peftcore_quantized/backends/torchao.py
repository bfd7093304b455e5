"""torchao: the schemes torchao-int8, torchao-int4 and torchao-float8 (weights only), and other weights of its tensor
classes.

Formats that also quantize the inputs can be read and dequantized. They cannot be adapted, because their forward has no
gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore import Scheme
from peftcore.author import Layer, QuantizedLayer, hookimpl, quantized_layer_of
from peftcore.errors import MergeError, QuantizationError, UnsupportedHost

PEFTCORE_API = 2


def _packed(weight: Tensor, config: Any) -> nn.Module:
    from torchao.quantization import quantize_

    if weight.shape[1] < 2:
        raise QuantizationError("torchao does not quantize weights with one input: exclude these layers")
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    quantize_(module, config)
    module.weight.requires_grad_(False)
    packed: Any = module.weight  # of a class of torchao by now
    codes: Any = packed.qdata
    if codes.is_floating_point():
        codes.view(torch.uint8)[(weight == 0).all(1)] = 0  # the scale of such rows is zero too, and the quotient NaN
    vars(module).pop("extra_repr", None)  # bound to this module, and no process but this one can read it
    return module


def _int8(weight: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _float8(weight: Any) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


def _intx(weight: Any) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=weight.target_dtype, granularity=PerGroup(weight.block_size[-1]))


PACKERS: dict[str, Callable[[Any], Any]] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _intx,
}
"""Functions that return the configuration for quantizing a changed weight again, by the weight's class in
`torchao.quantization`. Weights of other classes are refused."""


def _packs_inputs(weight: Any) -> bool:
    return getattr(weight, "act_quant_kwargs", None) is not None


@dataclass(frozen=True)
class TorchAOLayer(QuantizedLayer):
    """Reads and quantizes linear layers whose weight is one of torchao's tensors, for the core."""

    @property
    def saves_dense(self) -> bool:
        return True

    def unpack(self, module: nn.Module) -> Tensor:
        return module.weight.dequantize()  # type: ignore[operator]  # dequantize is no Module

    def dtype(self, module: nn.Module) -> torch.dtype | None:
        return module.weight.dtype  # type: ignore[return-value]

    def check_trains(self, module: nn.Module) -> None:
        if _packs_inputs(module.weight):
            raise UnsupportedHost(
                "torchao quantizes the inputs of these layers too, which passes no gradient; call "
                "peftcore.dequantize(model), or load the model with a weight-only configuration"
            )

    def check_cut(self, module: nn.Module) -> None:
        raise UnsupportedHost(
            "tensors of torchao cannot be sharded: keep the whole model in every process, or quantize with nf4, int8, "
            "int4, bnb-nf4 or hqq-4"
        )

    def pack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        held: Any = module.weight
        classes = vars(sys.modules["torchao.quantization"])
        config = next((pack for name, pack in PACKERS.items() if type(held) is classes.get(name)), None)
        if config is None or _packs_inputs(held):
            raise MergeError(
                f"torchao cannot quantize a merged weight into {type(held).__name__} again; merge with into='float'"
            )
        return _packed(weight.to(held.dtype), config(held))


class TorchaoInt8(Scheme):
    """The scheme of torchao's 8-bit integers, one scale a row."""

    layer: ClassVar[QuantizedLayer] = TorchAOLayer()
    requires: ClassVar[tuple[str, ...]] = ("torchao",)
    extra: ClassVar[str] = "peftcore-quantized[torchao]"

    def module(self, weight: Tensor) -> nn.Module:
        return _packed(weight, _int8(weight))


class TorchaoFloat8(TorchaoInt8):
    """The scheme of torchao's 8-bit floating point, one scale a row."""

    def module(self, weight: Tensor) -> nn.Module:
        return _packed(weight, _float8(weight))


class TorchaoInt4(TorchaoInt8):
    """The scheme of torchao's 4-bit integers, with a scale for each group. On a CPU each integer is stored in a
    byte."""

    group_size: PositiveInt = 32
    """Number of weights of a row that share a scale; it must divide the number of inputs."""

    def module(self, weight: Tensor) -> nn.Module:
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup

        if weight.shape[1] % self.group_size:
            raise QuantizationError(f"{weight.shape[1]} inputs are not divisible by group_size={self.group_size}")
        return _packed(weight, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(self.group_size)))  # type: ignore[attr-defined]  # torch has it, its stubs have not


@hookimpl
def peftcore_schemes() -> dict[str, str]:
    """Map the names of the schemes to their import paths."""
    known = (("torchao-int8", TorchaoInt8), ("torchao-int4", TorchaoInt4), ("torchao-float8", TorchaoFloat8))
    return {name: f"{__name__}:{cls.__name__}" for name, cls in known}


@hookimpl
def peftcore_layer(module: nn.Module, tensor: str) -> Layer | None:
    """Return the layer of a tensor that torchao has quantized, else None. This function does not import torchao. If it
    is not imported elsewhere, the tensor cannot be a torchao tensor."""
    utils, path, name = sys.modules.get("torchao.utils"), *tensor.rpartition(".")[::2]
    if utils is None:
        return None
    weight = module.get_submodule(path)._parameters.get("weight" if name == "bias" else name)
    ours = isinstance(weight, utils.TorchAOBaseTensor) and weight.dim() == 2
    return quantized_layer_of(module, tensor, TorchaoInt8.layer) if ours else None
