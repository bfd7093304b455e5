"""Effective tensors that are freed after the forward, and that backward computes again.

A checkpoint around the module would do this too. But it would also recompute the module's own operations, up to the
last tensor that the module saves: none for a linear layer, nearly all for experts or attention. So only the computation
of the effective tensors is checkpointed here. If the module saves such a tensor or a part of it, autograd saves a
reference that recomputes it instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from peftcore.errors import StaleBackward
from peftcore.layers.kernels.autograd import apply


class Unwritten:
    """Records the versions of tensors in a forward, to check that they are unchanged when backward recomputes from
    them. Autograd checks only tensors that it saves, and these are not saved."""

    def __init__(self, tensors: Iterable[Tensor], edition: Callable[[], object]) -> None:
        """`edition` returns another object after a merge has rewritten the weights."""
        self._seen = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]
        self._edition, self._before = edition, edition()

    def check(self) -> None:
        """Check that the tensors were not changed since the forward, as far as torch's version counter records it.

        Raises:
            StaleBackward: a tensor was changed.
        """
        written = [tensor for tensor, version in self._seen if tensor._version != version]
        if written or self._edition() is not self._before:
            what = f"a tensor of shape {list(written[0].shape)}" if written else "a weight (by a merge)"
            raise StaleBackward(
                f"{what} was overwritten between its forward and backward, and backward computes the layer again from "
                "it: run backward first, or write to a copy (`x = torch.relu(x)` instead of `x.relu_()`)"
            )


class RecomputedTensors:
    """Computes effective tensors (changed by operators) for a forward. Inside `hooks`, autograd does not save them, and
    backward computes them again."""

    def __init__(self, others: Iterable[Tensor], before: Unwritten) -> None:
        """`others` are tensors that stay in memory anyway: those of the base and of the operators."""
        self._living = {_memory(each) for each in others}
        self._before = before
        self._sources: list[_Source] = []
        self._known: WeakValueDictionary[int, _Source] = WeakValueDictionary()

    def __call__(self, path: str, make: Callable[[], Tensor | None]) -> Tensor | None:
        """Returns the result of `make`, which must return the same value when backward calls it again."""
        with torch.enable_grad():  # also where the first caller has no gradients
            tensor: Tensor | None = checkpoint(_made, self._before, make, use_reentrant=False)
        if tensor is not None and type(tensor) is Tensor and tensor.requires_grad:
            self._sources.append(source := _Source(tensor))
            self._known[_memory(tensor)] = source
        return tensor

    def all(self, makes: Mapping[str, Callable[[], Tensor | None]]) -> dict[str, Tensor | None] | None:
        """Returns all tensors by path. None if one of them cannot be recomputed separately, because it requires no
        gradient or is a tensor subclass."""
        tensors = {path: self(path, make) for path, make in makes.items()}
        alone = all(each is None or (type(each) is Tensor and each.requires_grad) for each in tensors.values())
        return tensors if alone else None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Context manager with saved-tensor hooks. A saved tensor that was computed here is replaced by a reference
        that recomputes it."""
        living, known = self._living, self._known  # all saved tensors hold `pack`, which must not hold the tensors

        def pack(tensor: Tensor) -> Tensor | _Part:
            memory = _memory(tensor)
            source = None if memory in living else known.get(memory)
            if source is None or source.version != tensor._version:  # or changed by the module (max_norm of embeddings)
                return tensor
            return _Part(source, tensor.size(), tensor.stride(), tensor.storage_offset())

        with saved_tensors_hooks(pack, _unpack):
            yield


def _made(before: Unwritten, make: Callable[[], Tensor | None]) -> Tensor | None:
    before.check()
    made = make()
    return None if made is None else apply(_Last, made)


class _Last(torch.autograd.Function):
    """Autograd function that saves its input, as the last saved tensor of the checkpoint."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor.data  # no view, which the module might not change

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class _Source:
    """A tensor that backward recomputes. The recomputed tensor is freed after the use of its last saved part."""

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
    """The reference that autograd saves instead of a tensor or a view of it."""

    source: _Source
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


def _unpack(saved: Tensor | _Part) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.source.tensor().as_strided(saved.size, saved.stride, saved.offset)


def _memory(tensor: Tensor) -> int:
    """Returns a key that identifies the storage of a tensor, also for meta and fake tensors."""
    address: int = tensor.untyped_storage()._cdata
    return address
