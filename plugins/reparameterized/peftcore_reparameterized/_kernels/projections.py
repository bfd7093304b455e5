"""Products with a fixed matrix that several sites share: q, k and v have the same input, which is projected once for
all three, and backward multiplies by the matrix once."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from peftcore.author import runs_plain


def plain_projected(x: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``A x`` in a dtype."""
    return F.linear(x.to(dtype), A.to(dtype))


def projected(x: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `plain_projected` of a fixed matrix. If the matrix projected this input in its last call, and backward
    still holds the product, that tensor is returned. The cache holds only weak references to x, A
    and the product.

    A leaf input may be overwritten without a version change (`x.data`), so its product is computed each time.
    """
    if runs_plain() or A.requires_grad:
        return plain_projected(x, A, dtype)
    if not torch.is_grad_enabled() or x.grad_fn is None or A.is_inference():
        return _Project.apply(x.to(dtype), A.to(dtype))
    asked = _Asked(x, A, dtype)
    found = _LAST.find(asked)
    if found is None:
        found = _Project.apply(x.to(dtype), A.to(dtype))
        _LAST.asked, _LAST.found = asked, TensorWeakRef(found)
    return found


class _Asked:
    """Weak references to the tensors of a product, and what else decides it."""

    def __init__(self, x: Tensor, A: Tensor, dtype: torch.dtype) -> None:
        whole = A if A._base is None else A._base
        self.tensors = TensorWeakRef(x), TensorWeakRef(whole)
        place = A.storage_offset(), A.shape, A.stride()
        self.rest = x._version, A._version, place, dtype

    def same(self, other: _Asked) -> bool:
        """Whether both would make the same product: of the same tensors, which nobody has changed meanwhile."""
        alike = self.rest == other.rest
        return alike and all(a() is b() for a, b in zip(self.tensors, other.tensors, strict=True))


class _Last(threading.local):
    """The last product of this thread."""

    asked: _Asked | None = None
    found: TensorWeakRef | None = None

    def find(self, asked: _Asked) -> Tensor | None:
        """Return the last product, if it is what is asked for and still alive."""
        if self.asked is None or self.found is None or not self.asked.same(asked):
            return None
        found: Tensor | None = self.found()
        return found


_LAST = _Last()


class _Project(torch.autograd.Function):
    """The projection as an autograd function without saved tensors: so a repeated forward may find the product where
    the first one made it, or the other way round, and several of its uses can be differentiated one after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor) -> Tensor:
        ctx.A = A
        return F.linear(x, A)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return gradient @ ctx.A, None
