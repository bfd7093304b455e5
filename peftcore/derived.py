"""Effective tensors that do not outlive a forward: backward makes them again, and nothing else.

A checkpoint around the module makes them again too, but with them whatever the module does until the last tensor that
it saves: of a linear layer nothing, of experts or attention nearly all. So what is checkpointed here is what makes the
tensors; and where the module saves one of them, or a part of one, it saves how to get it instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from peftcore.kernels.autograd import apply


def derived(
    makes: Mapping[str, Callable[[], Tensor | None]],
    run: Callable[[Mapping[str, Tensor | None]], Any],
    others: Iterable[Tensor],
) -> tuple[Any, bool]:
    """What `run` makes of effective tensors, and True; or False, where these cannot be made again alone: one has no
    gradient, or is of a class of its own.

    Args:
        makes: what makes each, by path; each must make the same when it is called again, in backward.
        run: the forward with these tensors.
        others: tensors that live on anyway: the base's own, and the operators'.
    """
    tensors = {path: checkpoint(_made, make, use_reentrant=False) for path, make in makes.items()}
    if not all(each is None or (type(each) is Tensor and each.requires_grad) for each in tensors.values()):
        return None, False
    living = {_memory(each) for each in others}
    sources = {_memory(each): _Source(each) for each in tensors.values() if each is not None}
    known = WeakValueDictionary(sources)  # whatever is saved holds `pack`, which must not hold the tensors

    def pack(tensor: Tensor) -> Tensor | _Part:
        memory = _memory(tensor)
        source = None if memory in living else known.get(memory)
        if source is None or source.version != tensor._version:  # or changed by the module (max_norm of embeddings)
            return tensor
        return _Part(source, tensor.size(), tensor.stride(), tensor.storage_offset())

    with saved_tensors_hooks(pack, _unpack):
        return run(tensors), True


def _made(make: Callable[[], Tensor | None]) -> Tensor | None:
    made = make()
    return None if made is None else apply(_Last, made)


class _Last(torch.autograd.Function):
    """Saves the tensor, as the last of what the checkpoint saves."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor.data  # no view, which the module might not change

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class _Source:
    """A tensor as backward has made it. It goes with the last of those who saved a part of it, each of which autograd
    lets go when it is through."""

    def __init__(self, tensor: Tensor) -> None:
        self.version = tensor._version
        self._node: Any = tensor.grad_fn
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        if self._tensor is None:
            (self._tensor,) = self._node.saved_tensors
        return self._tensor


@dataclass(frozen=True, slots=True)
class _Part:
    """What is saved in place of a tensor, or of a view of it."""

    source: _Source
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


def _unpack(saved: Tensor | _Part) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.source.tensor().as_strided(saved.size, saved.stride, saved.offset)


def _memory(tensor: Tensor) -> int:
    """Tells memory apart, also where there are shapes only."""
    address: int = tensor.untyped_storage()._cdata
    return address
