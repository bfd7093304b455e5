"""Lazy weights: they represent W + BA without computing the sum, for modules that read `weight` themselves.

Experts are stacked parameters and not layers, so an update cannot wrap their forward. But such a module only multiplies
by the weight, or selects the matrix of one expert. In training it reads a lazy weight, and a product with W + BA is
computed as one product with W and two with the factors. Neither the sum nor a gradient of its size is stored. Any other
operation computes the sum (the effective tensor) first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from peftcore.forward.tensors.mount import Mount
from peftcore.layers import kernels
from peftcore.layers.kernels.autograd import apply
from peftcore.layers.kinds import DENSE
from peftcore.layers.layer import Layer, put
from peftcore.utils.autocast import full_precision

ALIGNED = 16
"""The alignment in bytes of the rows of matrices in a grouped product."""


class _Whole:
    """Computes the effective tensor W + BA when it is first read. Later reads return the same tensor, because a module
    may have changed it in place."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self.tensor: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.tensor is None:
            self.tensor = self._make()
        return self.tensor


@dataclass(frozen=True)
class _Parts:
    """The weight and the factors of ``weight + left right``. `view` selects the same part from the whole effective
    tensor."""

    weight: Tensor
    """``[*experts, a, b]``."""
    left: Tensor
    """``[*experts, a, rank]``."""
    right: Tensor
    """``[*experts, rank, b]``."""
    whole: _Whole
    view: Callable[[Tensor], Tensor]

    @cached_property
    def _one_by_one(self) -> tuple[tuple[Tensor, ...], ...]:
        """The tensors of all experts, unbound at once. So backward stacks their gradients once, and not for each
        expert."""
        return self.weight.unbind(), self.left.unbind(), self.right.unbind()

    def one(self, expert: int) -> LowRankUpdatedWeight:
        """Returns the matrix of an expert."""
        before = self.view
        parts = self._one_by_one if torch.is_grad_enabled() else (self.weight, self.left, self.right)
        weight, left, right = (part[expert] for part in parts)
        return LowRankUpdatedWeight.of(_Parts(weight, left, right, self.whole, lambda whole: before(whole)[expert]))

    def several(self, experts: Tensor) -> LowRankUpdatedWeight:
        """Returns the matrices of experts ``[n]``."""
        before = self.view
        parts = self.weight[experts], self.left[experts], self.right[experts]
        return LowRankUpdatedWeight.of(_Parts(*parts, self.whole, lambda whole: before(whole)[experts]))

    def turned(self) -> LowRankUpdatedWeight:
        """Returns the transposed matrices."""
        before = self.view
        parts = self.weight.mT, self.right.mT, self.left.mT
        return LowRankUpdatedWeight.of(_Parts(*parts, self.whole, lambda whole: before(whole).mT))


class LowRankUpdatedWeight(Tensor):
    """A lazy weight: it represents W + BA without computing the sum. It has the shape, dtype and device of the sum, but
    lacks storage. Code that reads its values gets those of the sum, or an error."""

    parts: _Parts

    @staticmethod
    def of(parts: _Parts) -> LowRankUpdatedWeight:
        """Returns a lazy weight for the given parts. Gradients of the sum W + BA flow through it too."""
        tensors = parts.weight, parts.left, parts.right
        made: Any = apply(_Gradient, *tensors) if torch.is_grad_enabled() else _stand_in_for(parts.weight)
        made.parts = parts
        lazy_weight: LowRankUpdatedWeight = made
        return lazy_weight

    def effective(self) -> Tensor:
        """Returns the effective tensor W + BA."""
        return self.parts.view(self.parts.whole())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handles functions called from Python: computes products and indexing from the parts, and all other functions
        from the effective tensor."""
        kwargs = kwargs or {}
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        result = _ACTS[func](*args, **kwargs) if func in _ACTS else NotImplemented
        if result is NotImplemented:
            args, kwargs = tree_map_only(LowRankUpdatedWeight, LowRankUpdatedWeight.effective, (args, kwargs))
            result = func(*args, **kwargs)
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Handles operations that other code calls, after autograd has recorded the gradients."""
        args, kwargs = tree_map_only(LowRankUpdatedWeight, lambda each: each.effective().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _Gradient(torch.autograd.Function):
    """Autograd function that makes a lazy weight (a stand-in for W + BA). Functions with a custom backward may use the
    lazy weight and return the gradient of the effective tensor."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return _stand_in_for(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (left, right), (gradient,) = ctx.saved_tensors, gradients
        return gradient, gradient @ right.mT, left.mT @ gradient


def _stand_in_for(weight: Tensor) -> Tensor:
    made: Tensor = Tensor._make_wrapper_subclass(
        LowRankUpdatedWeight, weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device
    )
    return made


Pair = tuple[Tensor, Tensor]
"""The factors ``[*experts, out, rank]`` and ``[*experts, rank, in]``, whose product is the update."""


def factors_of(stored: Tensor | None, mounts: Sequence[Mount]) -> Pair | None:
    """Returns the low-rank update of a tensor, in the tensor's dtype; None if a mount (operator at a site) lacks
    factors for matrices.

    Args:
        stored: the tensor as the module stores it. Its logical layout is ``[*experts, out, in]``.
        mounts: the mounts that act on the tensor.
    """
    if type(stored) not in DENSE:
        return None
    assert stored is not None
    lefts, rights = [], []
    with full_precision(stored):
        for mount in mounts:
            A, B, scale = mount.operator.factors() or (None, None, 1.0)
            if A is None or B is None or not A.dim() == B.dim() == stored.dim():
                return None
            lefts.append(_all_rows(mount, (B * scale).to(stored.dtype), stored))
            rights.append(A.to(stored.dtype))
    return (lefts[0], rights[0]) if len(mounts) == 1 else (torch.cat(lefts, -1), torch.cat(rights, -2))


def _all_rows(mount: Mount, B: Tensor, stored: Tensor) -> Tensor:
    """Returns B for the whole tensor, with zeros outside the slices of the mount."""
    if mount.slices is None:
        return B
    shape = mount.layer.logical(stored).shape
    return put(B.new_zeros(*shape[:-1], B.shape[-1]), B, mount.slices, mount.layer.batch_dims)


def lazy_weight(stored: Tensor | None, layer: Layer, factors: Pair, make: Callable[[], Tensor]) -> Tensor:
    """Returns a lazy weight for a stored tensor and its update. `make` computes the effective tensor in the layout of
    the stored one."""
    assert stored is not None
    logical = LowRankUpdatedWeight.of(_Parts(layer.logical(stored), *factors, _Whole(make), layer.logical))
    return layer.stored(logical)


def _open(lazy_weight: Any, *others: Any) -> _Parts | None:
    """Returns the parts of a lazy weight (a stand-in for W + BA), so that products can use them. None if the effective
    tensor was already computed, or if another argument is a lazy weight too."""
    if type(lazy_weight) is not LowRankUpdatedWeight or any(type(other) is LowRankUpdatedWeight for other in others):
        return None
    return None if lazy_weight.parts.whole.tensor is not None else lazy_weight.parts


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    parts = _open(weight, input, bias)
    if parts is None or weight.dim() != 2:
        return NotImplemented
    frozen = not parts.weight.requires_grad and (bias is None or not bias.requires_grad)
    product = kernels.low_rank_linear if frozen else kernels.plain_low_rank_linear
    return product(input, parts.weight, bias, parts.right, parts.left, 1.0)


def _matmul(input: Any = None, other: Any = None, **named: Any) -> Any:
    if named or not all(isinstance(each, Tensor) and each.dim() > 1 for each in (input, other)):
        return NotImplemented
    if (parts := _open(other, input)) is not None:
        return (input @ parts.weight).add_((input @ parts.left) @ parts.right)
    if (parts := _open(input, other)) is not None:
        return (parts.weight @ other).add_(parts.left @ (parts.right @ other))
    return NotImplemented


def _grouped(rows: Tensor, weight: Any, *unknown: Any, bias: Tensor | None = None, **how: Any) -> Any:
    parts = _open(weight, rows, bias)
    if parts is None or unknown or weight.dim() != 3:
        return NotImplemented
    left, right = parts.left, parts.right
    if more := -left.shape[-1] % (ALIGNED // left.element_size()):
        left, right = F.pad(left, (0, more)), F.pad(right, (0, 0, 0, more))
    low = _GROUPED(rows, left, offs=how.get("offs"))
    return _GROUPED(rows, parts.weight, bias=bias, **how).add_(_GROUPED(low, right, **how))


def _pick(lazy_weight: Any, index: Any) -> Any:
    parts = _open(lazy_weight)
    if parts is None or lazy_weight.dim() != 3:
        return NotImplemented
    if isinstance(index, Tensor) and index.dtype is torch.long and index.dim() == 1:
        return parts.several(index)
    if isinstance(index, Tensor) and index.dtype is torch.long and not index.dim():
        index = int(index)  # a GPU is waited for once
    return parts.one(index) if type(index) is int else NotImplemented


def _all(lazy_weight: Any, dim: int = 0) -> Any:
    parts = _open(lazy_weight)
    if parts is None or lazy_weight.dim() != 3 or dim != 0:
        return NotImplemented
    return tuple(parts.one(expert) for expert in range(len(parts.weight)))


def _transpose(lazy_weight: Any, dim0: Any = -2, dim1: Any = -1) -> Any:
    parts, dims = _open(lazy_weight), lazy_weight.dim()
    if parts is None or {dim0, dim1} not in ({-2, -1}, {dims - 2, dims - 1}):
        return NotImplemented
    return parts.turned()


def _turn(lazy_weight: Any) -> Any:
    return _transpose(lazy_weight) if lazy_weight.dim() == 2 else NotImplemented  # of more it is another thing


_GROUPED: Any = vars(torch).get("_grouped_mm")
"""The function that torch's `grouped_mm` calls; None in older versions of torch."""
_GETS: Any = vars(torch._C.TensorBase)
_LOOKS: frozenset[Any] = frozenset(
    [
        *(_GETS[name].__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
        *(getattr(Tensor, name) for name in ("size", "dim", "numel", "element_size", "is_floating_point", "__len__")),
    ]
)
"""Functions that read no values of a tensor."""
_ACTS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), _matmul),
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm), _matmul),
    Tensor.__rmatmul__: lambda one, other: _matmul(other, one),
    Tensor.__getitem__: _pick,
    **dict.fromkeys((torch.unbind, Tensor.unbind), _all),
    **dict.fromkeys((torch.transpose, Tensor.transpose, _GETS["mT"].__get__), _transpose),
    **dict.fromkeys((torch.t, Tensor.t, _GETS["T"].__get__), _turn),
}
"""Functions that are computed from the parts of a lazy weight."""
if _GROUPED is not None:
    _ACTS[_GROUPED] = _grouped
