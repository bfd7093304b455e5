"""Products with a fixed matrix that several sites share. For example, q, k and v have the same input: it is multiplied
by the matrix once for all three, and backward multiplies once too."""

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
    """Return `plain_projected` of a fixed matrix. If the previous call had the same input and matrix, and its product
    is still in memory, that tensor is returned. The cache contains only weak references to x, A and the product.

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
    """The key of a product in the cache: weak references to its tensors, and the other values that determine it."""

    def __init__(self, x: Tensor, A: Tensor, dtype: torch.dtype) -> None:
        whole = A if A._base is None else A._base
        self.tensors = TensorWeakRef(x), TensorWeakRef(whole)
        place = A.storage_offset(), A.shape, A.stride()
        self.rest = x._version, A._version, place, dtype

    def same(self, other: _Asked) -> bool:
        """Whether both keys are those of the same product: the tensors are the same, and have not changed in
        between."""
        alike = self.rest == other.rest
        return alike and all(a() is b() for a, b in zip(self.tensors, other.tensors, strict=True))


class _Last(threading.local):
    """The last product of this thread."""

    asked: _Asked | None = None
    found: TensorWeakRef | None = None

    def find(self, asked: _Asked) -> Tensor | None:
        """Return the last product if `asked` is its key and it is still in memory, else None."""
        if self.asked is None or self.found is None or not self.asked.same(asked):
            return None
        found: Tensor | None = self.found()
        return found


_LAST = _Last()


class _Project(torch.autograd.Function):
    """The projection as an autograd function without saved tensors. So under gradient checkpointing, one of the two
    forwards may compute the product and the other one read it from the cache. Several uses of the product can be
    differentiated one after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor) -> Tensor:
        ctx.A = A
        return F.linear(x, A)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return gradient @ ctx.A, None
