"""Random numbers that are functions of a seed, the number of the draw, a row, and a position in that row.

Torch's generators produce numbers in sequence, so the number at a position changes if rows become longer. Here each
number is a hash of its coordinates. So the numbers of a shorter row are the first numbers of a longer row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from peftcore.forward.context.activation_checkpoints import running

aten: Any = torch.ops.aten
WIDE = 53
"""The number of significant bits of a float64. Two 32-bit hashes are needed for them."""


def mixed(seed: int, *parts: object) -> int:
    """Returns a seed derived from `seed` and `parts`: an integer from 0 to 2**63 - 1."""
    text = "\0".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class CountedDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager in which torch's functions draw numbers that are hashes of their coordinates. It covers dropout
    and these distributions: uniform, normal, exponential, Bernoulli and integers. All other draws (permutations,
    multinomial and gamma numbers) use torch's generators. So do draws within a checkpoint that begins inside the block.

    Args:
        seed: the seed.
        rows: for each row of the batch, its number among the rows of the adapter.
        own: the number of rows of the adapter, since operators may receive only these rows. If the length of a tensor
            is a multiple of the number of all rows, or else of this number, each row has an equal part of the tensor.
    """

    def __init__(self, seed: int, rows: Sequence[int], own: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed, self.rows, self.own, self.count, self.rests = seed, rows, own, 0, False
        """`rests`: whether torch's generators are used at the moment."""
        self._within = running()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draw = DRAWS.get(func)
        if draw is None or self.rests or kwargs.get("generator") is not None or not _is_plain(args):
            return func(*args, **kwargs)
        if [*map(id, running())] != [*map(id, self._within)]:  # backward repeats it outside of this block
            return func(*args, **kwargs)
        self.count += 1
        return draw(self, *args, **{name: value for name, value in kwargs.items() if name != "generator"})

    @contextmanager
    def out(self) -> Iterator[None]:
        """Context manager that suspends this mode, unless another mode was entered after it."""
        if _get_current_dispatch_mode() is not self:
            yield
            return
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self.__enter__()  # type: ignore[no-untyped-call]

    def bits(self, shape: Sequence[int], device: torch.device, which: int = 0) -> Tensor:
        """Returns an int32 tensor of the given shape. Each entry is a random integer from -2**31 to 2**31 - 1."""
        length = shape[0] if shape else 1
        counted = (each for each in (self.rows, range(self.own)) if each and not length % len(each))
        numbers = next(counted, range(length))
        axes = [len(numbers), length // len(numbers) if length else 0, *shape[1:]]
        places = [torch.arange(size, dtype=torch.int32, device=device) for size in axes]
        if not isinstance(numbers, range):
            places[0] = torch.tensor(numbers, dtype=torch.int32, device=device)
        *before, last = [each.mul_(STEPS[axis % len(STEPS)]) for axis, each in enumerate(places)]
        code = before[0]
        for each in before[1:]:
            code = code.unsqueeze(-1) + each
        salts = [mixed(self.seed, self.count, which, part) % 2**32 - 2**31 for part in range(2)]
        found = _hashed(code.add_(salts[0])).unsqueeze(-1) + _hashed(last.add_(salts[1]))
        return _hashed(found).view(shape)

    def unit(self, like: Tensor) -> Tensor:
        """Returns random numbers from 0 (included) to 1 (excluded), with the shape and dtype of a floating-point
        tensor."""
        digits = 1 - round(math.log2(torch.finfo(like.dtype).eps))
        if digits < WIDE:
            return self._first(like, digits).to(torch.float32).mul_(2.0**-digits).to(like.dtype)
        more = self._first(like, WIDE - 24, 1).to(torch.float64).mul_(2.0**-WIDE)
        return self._first(like, 24).to(torch.float64).mul_(2.0**-24).add_(more)

    def normal(self, like: Tensor) -> Tensor:
        """Returns numbers of the standard normal distribution, with the shape and dtype of a tensor."""
        precise = torch.promote_types(like.dtype, torch.float32)
        middle = self.unit(torch.empty(like.shape, dtype=precise, device=like.device))
        return middle.mul_(2).sub_(1 - torch.finfo(precise).eps / 2).erfinv_().mul_(math.sqrt(2)).to(like.dtype)

    def happens(self, like: Tensor, chance: float | Tensor) -> Tensor:
        """Returns a boolean tensor of the shape of `like`; each entry is True with probability `chance`."""
        if isinstance(chance, Tensor):
            return self.unit(torch.empty(like.shape, dtype=torch.float64, device=like.device)) < chance
        if chance >= 1:
            return torch.ones(like.shape, dtype=torch.bool, device=like.device)
        return self.bits(like.shape, like.device) < int(chance * 2**32) - 2**31

    def _first(self, like: Tensor, digits: int, which: int = 0) -> Tensor:
        """Returns random integers with the given number of binary digits, with the shape of a tensor."""
        return (self.bits(like.shape, like.device, which) >> (32 - digits)).bitwise_and_(2**digits - 1)


STEPS = (-1640531535, 1013904243, -2147102765, 1664525197, -1150833019, 748931239, -328493541)
"""Odd multipliers for the coordinates of an entry, so that the sums are different for all entries."""


def _hashed(x: Tensor) -> Tensor:
    """Returns int32 numbers in which each bit depends on all bits of the input (the finalizer of MurmurHash3). Changes
    the input in place."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(-2048144789)
    x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF)).mul_(-1028477387)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _is_plain(args: Sequence[Any]) -> bool:
    """Whether all tensors among the arguments are plain torch tensors of real numbers."""
    tensors = [each for each in args if isinstance(each, Tensor)]
    return all(type(each) in (Tensor, torch.nn.Parameter) and not each.is_complex() for each in tensors)


def _dropout(draw: CountedDraws, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    kept = draw.happens(x, 1 - p if train in (True, None) else 1.0)
    return x * kept * (0.0 if p == 1 else 1 / (1 - p) if train in (True, None) else 1.0), kept


def _uniform(draw: CountedDraws, x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return x.copy_(draw.unit(x).mul_(high - low).add_(low))


def _normal(draw: CountedDraws, x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return x.copy_(draw.normal(x).mul_(std).add_(mean))


def _exponential(draw: CountedDraws, x: Tensor, rate: float = 1.0) -> Tensor:
    precise = torch.promote_types(x.dtype, torch.float32)
    unit = draw.unit(torch.empty(x.shape, dtype=precise, device=x.device))
    return x.copy_(unit.clamp_(min=torch.finfo(precise).eps / 4).log_().div_(-rate))  # never 0, which has no logarithm


def _bernoulli(draw: CountedDraws, x: Tensor, chance: float | Tensor = 0.5) -> Tensor:
    return x.copy_(draw.happens(x, chance))


def _whole(draw: CountedDraws, x: Tensor, low: int, high: int) -> Tensor:
    unit = draw.unit(torch.empty(x.shape, dtype=torch.float64, device=x.device))
    return x.copy_(unit.mul_(high - low).floor_().add_(low))


def _of_size(fill: Callable[..., Tensor], count: int = 0) -> Callable[..., Tensor]:
    """Returns a function that makes a tensor and fills it by `fill`. Its arguments are `count` numbers, then the
    size."""

    def make(draw: CountedDraws, *args: Any, **options: Any) -> Tensor:
        return fill(draw, torch.empty(args[count], **options), *args[:count])

    return make


def _like(fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a function that makes a tensor like another one, and fills it by `fill`."""

    def make(draw: CountedDraws, like: Tensor, *args: Any, **options: Any) -> Tensor:
        return fill(draw, torch.empty_like(like, **options), *args)

    return make


def _below(draw: CountedDraws, x: Tensor, high: int) -> Tensor:
    return _whole(draw, x, 0, high)


def _integers(fill: Callable[..., Tensor], count: int) -> Callable[..., Tensor]:
    made = _of_size(fill, count)
    return lambda draw, *args, **options: made(draw, *args, **{**options, "dtype": options.get("dtype") or torch.int64})


def _chances(draw: CountedDraws, chance: Tensor) -> Tensor:
    return torch.empty_like(chance).copy_(draw.happens(chance, chance))


DRAWS: dict[Any, Callable[..., Any]] = {
    aten.native_dropout.default: _dropout,
    aten.uniform_.default: _uniform,
    aten.normal_.default: _normal,
    aten.exponential_.default: _exponential,
    aten.bernoulli_.float: _bernoulli,
    aten.bernoulli_.Tensor: _bernoulli,
    aten.bernoulli.default: _chances,
    aten.bernoulli.p: _like(_bernoulli),
    aten.rand.default: _of_size(_uniform),
    aten.randn.default: _of_size(_normal),
    aten.rand_like.default: _like(_uniform),
    aten.randn_like.default: _like(_normal),
    aten.randint.default: _integers(_below, 1),
    aten.randint.low: _integers(_whole, 2),
    aten.randint_like.default: _like(_below),
    aten.randint_like.low_dtype: _like(_whole),
}
"""The functions that replace torch's random operations, by operation."""
