"""bitsandbytes: the schemes bnb-nf4, bnb-fp4 and bnb-int8 (LLM.int8), and models that transformers loaded with them.

On CPUs with AVX512-BF16, a forward in evaluation mode repacks the codes of a `Linear4bit` for a kernel that has no
gradient. Training after that would silently have zero gradients. The repacking also rounds the scales, and fails if the
number of rows is not a multiple of 32. Weights quantized by peftcore are never repacked. In a host quantized by another
library, peftcore disables the repacking while an adapter is installed. If the codes are repacked already, they are
restored, but with the rounded scales, because the exact ones are lost.
"""

from __future__ import annotations

import copy
import functools
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from peftcore import Scheme
from peftcore.author import ForcedAttributes, Layer, QuantizedLayer, hookimpl, quantized_layer_of
from peftcore.errors import QuantizationError, UnsupportedHost

PEFTCORE_API = 2


def _nn() -> Any:
    """Return `bitsandbytes.nn.modules` if it is imported, else None. If it is not imported, no module can be of its
    classes."""
    return sys.modules.get("bitsandbytes.nn.modules")


def _plain_codes(weight: Any) -> tuple[Tensor, Any]:
    """Return the codes and their state in the common layout, even if a forward in evaluation mode repacked them. The
    weight itself is not changed."""
    state = weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return weight.data, state
    functional = sys.modules["bitsandbytes.functional"]
    unpack = vars(functional)["_convert_weight_packed_for_cpu_inverse"]
    codes, plain = unpack(weight.data, copy.copy(state))
    if not plain.nested:  # bitsandbytes 0.50 leaves these scales as they lay: [blocks of a row, rows]
        plain.absmax = state.absmax.T.reshape(-1).to(torch.float32)
    return codes, plain


@dataclass(frozen=True)
class FourBit(QuantizedLayer):
    """Reads and quantizes `Linear4bit` for the core."""

    def unpack(self, module: nn.Module) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        codes, state = _plain_codes(module.weight)
        return dequantize_4bit(codes, state)

    def dtype(self, module: nn.Module) -> torch.dtype | None:
        return module.weight.quant_state.dtype  # type: ignore[union-attr,return-value]

    def pack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        held: Any = module.weight
        new = _four_bit(weight, held.quant_type, held.blocksize, held.compress_statistics, held.quant_storage)
        new.compute_dtype, new.compute_type_is_set = module.compute_dtype, module.compute_type_is_set
        return new


def _four_bit(weight: Tensor, kind: str, block_size: int, double: bool, storage: torch.dtype = torch.uint8) -> Any:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    rows, columns = weight.shape
    how: dict[str, Any] = {"quant_type": kind, "compress_statistics": double, "quant_storage": storage}
    module = Linear4bit(columns, rows, bias=False, device="meta", **how)  # no weight is allocated and drawn in vain
    dense = weight.detach().contiguous()
    codes: Any = Params4bit(dense, requires_grad=False, blocksize=block_size, module=module, **how)
    module.weight = codes.to(weight.device)
    module.support_avx512bf16_for_cpu = False
    return module


@dataclass(frozen=True)
class EightBit(QuantizedLayer):
    """Reads and quantizes `Linear8bitLt` for the core. Such a module does not store the dtype that it was quantized
    from."""

    def unpack(self, module: nn.Module) -> Tensor:
        codes, scale = _eight_bit_state(module)
        return codes * (scale / 127)[:, None]

    def dtype(self, module: nn.Module) -> torch.dtype | None:
        return None

    def check_cut(self, module: nn.Module) -> None:
        raise UnsupportedHost(
            "8-bit weights of bitsandbytes cannot be sharded, because they would lose their scales: keep the whole "
            "model in every process, or quantize with bnb-nf4, nf4, int8, int4 or hqq-4"
        )

    def pack(self, module: Any, weight: Tensor) -> nn.Module:
        return _eight_bit(weight, module.state.threshold)


def _eight_bit_state(module: Any) -> tuple[Tensor, Tensor]:
    """Return the codes and the scale of each row. The first forward moves the scales from the weight to the module's
    state."""
    moved = module.weight.SCB is None
    return (module.weight.data, module.state.SCB) if moved else (module.weight.CB, module.weight.SCB)


def _eight_bit(weight: Tensor, threshold: float) -> Any:
    from bitsandbytes.nn.modules import Int8Params, Linear8bitLt

    if weight.shape[1] < 2:
        raise QuantizationError(
            "bitsandbytes computes wrong outputs for 8-bit weights with one input: exclude these layers"
        )
    rows, columns = weight.shape
    how: dict[str, Any] = {"has_fp16_weights": False, "threshold": threshold, "device": "meta"}
    module: Any = Linear8bitLt(columns, rows, bias=False, **how)
    module.weight = Int8Params(weight.detach().float().contiguous().cpu(), requires_grad=False, has_fp16_weights=False)
    module.weight = module.weight.to(weight.device)
    return module


class BnbScheme(Scheme):
    """Base class of the schemes of bitsandbytes."""

    requires: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    extra: ClassVar[str] = "peftcore-quantized[bitsandbytes]"


class BnbNF4(BnbScheme):
    """The scheme of bitsandbytes' 4-bit NormalFloat."""

    layer: ClassVar[QuantizedLayer] = FourBit()
    kind: ClassVar[str] = "nf4"
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """How many weights share a scale."""
    double_quant: bool = False
    """Keep the scales in 8 bits."""

    def module(self, weight: Tensor) -> nn.Module:
        return _four_bit(weight, self.kind, self.block_size, self.double_quant)


class BnbFP4(BnbNF4):
    """The scheme of bitsandbytes' 4-bit floating point."""

    kind: ClassVar[str] = "fp4"


class BnbInt8(BnbScheme):
    """The scheme LLM.int8: 8-bit integers with one scale for each row. Inputs are quantized too, except columns with
    outliers."""

    layer: ClassVar[QuantizedLayer] = EightBit()
    threshold: NonNegativeFloat = 6.0
    """Columns of the input with a value above this threshold are multiplied in floating point. With 0 there are no such
    columns."""

    def module(self, weight: Tensor) -> nn.Module:
        return _eight_bit(weight, self.threshold)


@hookimpl
def peftcore_schemes() -> dict[str, str]:
    """Map the names of the schemes to their import paths."""
    ours = (("bnb-nf4", BnbNF4), ("bnb-fp4", BnbFP4), ("bnb-int8", BnbInt8))
    return {name: f"{__name__}:{cls.__name__}" for name, cls in ours}


@hookimpl
def peftcore_layer(module: nn.Module, tensor: str) -> Layer | None:
    """Return the layer of a module that bitsandbytes has quantized, else None."""
    classes, owner = _nn(), module.get_submodule(tensor.rpartition(".")[0])
    if classes is None:
        return None
    if isinstance(owner, classes.Linear4bit):
        return quantized_layer_of(module, tensor, BnbNF4.layer) if _is_packed(owner) else None
    eight = isinstance(owner, classes.Linear8bitLt) and not owner.state.has_fp16_weights
    return quantized_layer_of(module, tensor, BnbInt8.layer) if eight else None


def _is_packed(module: Any) -> bool:
    """Whether the weight is quantized. bitsandbytes quantizes it when the module is first moved to a device."""
    return isinstance(module.weight, _nn().Params4bit) and module.weight.quant_state is not None


def _unpack_for_gradients(module: Any) -> None:
    if _is_packed(module):
        module.weight.data, module.weight.quant_state = _plain_codes(module.weight)
        module.quant_state = module.weight.quant_state


def _may_pack_again(module: Any) -> bool:
    """Whether a CPU may repack the codes of a module. The attribute that prevents this is set only for such modules,
    because it costs time in each call. It is not set for modules that are moved to a CPU later."""
    return module.support_avx512bf16_for_cpu and module.weight.device.type in ("cpu", "meta")


@functools.cache
def _held() -> ForcedAttributes:
    return ForcedAttributes({"support_avx512bf16_for_cpu": False}, wanted=_may_pack_again, ready=_unpack_for_gradients)


@hookimpl
def peftcore_forced_attributes(cls: type[nn.Module]) -> ForcedAttributes | None:
    """Return the attribute that prevents the repacking of codes, or None for other classes. After a repacking, a module
    would have no gradient."""
    classes = _nn()
    return _held() if classes is not None and issubclass(cls, classes.Linear4bit) else None
