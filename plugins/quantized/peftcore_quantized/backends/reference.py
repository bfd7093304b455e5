"""Quantization in plain torch, on any device: the schemes nf4, int8 and int4. Faster implementations are tested against
them.

    nf4    QLoRA's 4-bit NormalFloat (arXiv 2305.14314): the nearest of 16 quantiles of a normal distribution to
           w / absmax, in blocks of the flattened weight; with `double_quant` the absmax are stored in 8 bits
           themselves. Codes and numbers are those of bitsandbytes, to the bit; except for a few absmax in a thousand
           with `double_quant`, where peftcore takes the nearest level and bitsandbytes on a CPU the adjacent one.
    int8   round(127 w / absmax), one absmax for each row
    int4   round(w / scale + zero), one scale and one zero for each group of a row, both in floating point

and nf4-icq, which is nf4 of shifted blocks (see `_icq`).

Forward dequantizes the weight, and backward dequantizes it again, so the dense weight is not kept in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore import Scheme
from peftcore.author import Layer, QuantizedLayer, hookimpl, quantized_layer_of
from peftcore.errors import QuantizationError

PEFTCORE_API = 2
DOUBLE = 256
"""Number of absmax values that share a scale when they are quantized too."""
GRID = 65535
"""Number of grid steps between -1 and 1 for the quantized absmax values."""
TINY = 1e-38
"""The divisor used instead of zero, for blocks in which all values are zero."""


def _normal_quantiles() -> list[float]:
    top = 0.9677083  # halfway between the last quantiles of 15 and of 16 levels
    upper, lower = (torch.linspace(top, 0.5, n, dtype=torch.float32, device="cpu")[:-1].double() for n in (9, 8))
    levels = torch.cat([-torch.special.ndtri(lower), upper.new_zeros(1), torch.special.ndtri(upper)]).float().sort()
    return (levels.values / levels.values[-1]).tolist()


def _dynamic() -> list[float]:
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        positive += (10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return sorted([*(-level for level in positive), *positive, 0.0, 1.0])


NORMAL = _normal_quantiles()
"""The 16 levels of NF4, ascending: quantiles of the normal distribution, eight above zero and seven below, scaled to
[-1, 1]. They are numbers, because a tensor would belong to one device or to a compiler's trace."""
DYNAMIC = _dynamic()
"""The 256 levels of the dynamic 8-bit type (arXiv 1511.04561): seven decades, each with twice the levels of the one
below it."""


def nearest(values: Tensor, levels: list[float]) -> Tensor:
    """Return the index of the level nearest to each value, as uint8. Of two equally near levels the lower one is
    chosen."""
    known = torch.tensor(levels, dtype=torch.float32, device=values.device)
    return torch.bucketize(values, (known[1:] + known[:-1]) / 2).to(torch.uint8)


def look_up(codes: Tensor, levels: list[float]) -> Tensor:
    """Return the level of each code, which is an index into `levels`."""
    return torch.tensor(levels, dtype=torch.float32, device=codes.device)[codes.int()]


def blocks_of(values: Tensor, size: int, fill: int = 0) -> Tensor:
    """Return the flattened values in rows of `size`. The last row is padded with `fill`."""
    return F.pad(values.reshape(-1), (0, -values.numel() % size), value=fill).view(-1, size)


def nibbles(codes: Tensor, fill: int = 0) -> Tensor:
    """Return 4-bit codes packed in pairs into bytes, with the first code of a pair in the upper half."""
    pairs = blocks_of(codes, 2, fill)
    return pairs[:, 0] << 4 | pairs[:, 1]


def from_nibbles(packed: Tensor) -> Tensor:
    """Return the two 4-bit codes of each byte, as int32."""
    return torch.stack([packed >> 4, packed & 15], -1).reshape(-1).int()


class Frozen(torch.autograd.Function):
    """Computes ``x W^T``. Forward and backward each call `decode` with the packed tensors to get W."""

    @staticmethod
    def forward(x: Tensor, decode: Callable[..., Tensor], *packed: Tensor) -> Tensor:
        return F.linear(x, decode(*packed).to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.decode, *packed = inputs
        ctx.save_for_backward(*packed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed = ctx.saved_tensors
        return grad @ ctx.decode(*packed).to(grad.dtype), None, *(None for _ in packed)


class PackedLinear(nn.Module):
    """A linear layer with a quantized weight. Subclasses define `encode` and `decode`."""

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, options: dict[str, Any]) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype, self.options = weight.dtype, options
        for name, tensor in self.encode(weight.detach().float().contiguous(), **options).items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", None)

    def encode(self, weight: Tensor, **options: Any) -> dict[str, Tensor]:
        """Return the packed tensors of a weight ``[out, in]``."""
        raise NotImplementedError

    def decode(self, *packed: Tensor) -> Tensor:
        """Return the weight from the packed tensors, in float32."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move and cast the module. A cast sets the dtype of the dense weight and casts the bias. Packed tensors are
        moved to other devices, but keep their dtype."""
        packed = {id(tensor) for tensor in self._buffers.values()}

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in packed and new.dtype != tensor.dtype else new

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        super()._apply(moved, recurse)
        return self

    @property
    def weight(self) -> Tensor:
        """Return a dense copy of the weight."""
        return self.decode(*self._packed()).to(self.dtype)

    def _packed(self) -> list[Tensor]:
        return [each for each in self._buffers.values() if each is not None]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``, in the dtype of x."""
        y: Tensor = Frozen.apply(x, self.decode, *self._packed())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        return f"in_features={self.in_features}, out_features={self.out_features}{options}"


class NF4Linear(PackedLinear):
    """A linear layer in 4-bit NormalFloat with blocks."""

    def encode(self, weight: Tensor, block_size: int, double_quant: bool) -> dict[str, Tensor]:  # type: ignore[override]
        blocks = blocks_of(weight, block_size)
        absmax = blocks.abs().amax(1)
        scaled = blocks * (1 / absmax.clamp_min(TINY))[:, None]
        if weight.numel() % block_size:  # bitsandbytes treats the last block another way
            absmax[-1].clamp_min_(TINY)
            scaled[-1] = blocks[-1] / absmax[-1]
        codes = nearest(scaled.view(-1)[: weight.numel()], NORMAL)
        packed = {"codes": nibbles(codes, fill=NORMAL.index(0))}
        return {**packed, **(self._in_eight_bits(absmax) if double_quant else {"absmax": absmax})}

    @staticmethod
    def _in_eight_bits(absmax: Tensor) -> dict[str, Tensor]:
        """Return the absmax values in 8 bits: the difference of each from the mean, as codes of `DYNAMIC`. As in
        bitsandbytes, the differences are rounded to a grid before the nearest level is chosen."""
        mean = absmax.mean()
        rest = blocks_of(absmax - mean, DOUBLE)
        scale = rest.abs().amax(1)
        scaled = (rest * (1 / scale)[:, None]).clamp(-1, 1)
        steps = ((scaled + 1) * 0.5 * GRID + 0.5).floor()
        codes = nearest(steps / GRID * 2 - 1, DYNAMIC).where(scale[:, None] > 0, 0).view(-1)[: absmax.numel()]
        return {"absmax_codes": codes, "absmax_scale": scale, "absmax_mean": mean}

    def decode(self, codes: Tensor, *absmax: Tensor) -> Tensor:  # type: ignore[override]  # called with what `encode` made
        size, shape = self.options["block_size"], (self.out_features, self.in_features)
        block_absmax = absmax[0]
        if self.options["double_quant"]:
            small, scale, mean = absmax
            block_absmax = (blocks_of(look_up(small, DYNAMIC), DOUBLE) * scale[:, None]).view(-1)[
                : small.numel()
            ] + mean
        levels = look_up(from_nibbles(codes)[: shape[0] * shape[1]], NORMAL)
        return (blocks_of(levels, size) * block_absmax[:, None]).view(-1)[: levels.numel()].view(shape)


class Int8Linear(PackedLinear):
    """A linear layer in 8-bit integers, one scale a row."""

    def encode(self, weight: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        absmax = weight.abs().amax(1, keepdim=True)
        return {"codes": (weight * (127 / absmax.clamp_min(TINY))).round().to(torch.int8), "scale": absmax / 127}

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return codes * scale


class Int4Linear(PackedLinear):
    """A linear layer in 4-bit integers, a scale and a floating-point zero for each group of a row."""

    def encode(self, weight: Tensor, group_size: int) -> dict[str, Tensor]:  # type: ignore[override]
        if weight.shape[1] % group_size:
            raise QuantizationError(f"int4: {weight.shape[1]} inputs are not divisible by group_size={group_size}")
        groups = weight.view(weight.shape[0], -1, group_size)
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = ((high - low) / 15).clamp_min(TINY)
        codes = ((groups - low) / scale).round().to(torch.uint8)
        return {"codes": nibbles(codes.view(-1)), "scale": scale.squeeze(2), "zero": (-low / scale).squeeze(2)}

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:  # type: ignore[override]
        shape = (self.out_features, self.in_features)
        levels = from_nibbles(codes)[: shape[0] * shape[1]].view(shape[0], -1, self.options["group_size"])
        return ((levels - zero[:, :, None]) * scale[:, :, None]).view(shape)


@dataclass(frozen=True)
class ReferenceLayer(QuantizedLayer):
    """Reads and quantizes modules of the class `PackedLinear` for the core."""

    def unpack(self, module: nn.Module) -> Tensor:
        return module.weight  # type: ignore[return-value]

    def dtype(self, module: nn.Module) -> torch.dtype:
        return module.dtype  # type: ignore[return-value]

    def pack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        return type(module)(weight.to(self.dtype(module)), module.options)


class Reference(Scheme):
    """Base class of the schemes that quantize in plain torch."""

    layer: ClassVar[QuantizedLayer] = ReferenceLayer()
    kind: ClassVar[type[PackedLinear]]

    def module(self, weight: Tensor) -> nn.Module:
        return self.kind(weight, self.model_dump())


class ReferenceNF4(Reference):
    """The scheme of 4-bit NormalFloat."""

    kind = NF4Linear
    block_size: PositiveInt = 64
    """How many weights share a scale."""
    double_quant: bool = False
    """Keep the scales in 8 bits."""


class ReferenceInt8(Reference):
    """The scheme of 8-bit integers."""

    kind = Int8Linear


class ReferenceInt4(Reference):
    """The scheme of 4-bit integers with zeros."""

    kind = Int4Linear
    group_size: PositiveInt = 32
    """Number of weights of a row that share a scale and a zero; it must divide the number of inputs."""


@hookimpl
def peftcore_schemes() -> dict[str, str]:
    """Map the names of the schemes to their import paths."""
    ours = (("nf4", ReferenceNF4), ("int8", ReferenceInt8), ("int4", ReferenceInt4))
    here = {name: f"{__name__}:{cls.__name__}" for name, cls in ours}
    return {**here, "nf4-icq": f"{__package__}._icq:ICQ"}


@hookimpl
def peftcore_layer(module: nn.Module, tensor: str) -> Layer | None:
    """Return the layer of a module that a scheme of this backend has quantized, else None."""
    owner = module.get_submodule(tensor.rpartition(".")[0])
    return quantized_layer_of(module, tensor, ReferenceNF4.layer) if isinstance(owner, PackedLinear) else None
