"""Effective tensors that do not outlive a forward: backward makes them again, and nothing else.

A checkpoint around the module makes them again too, but with them whatever the module does until the last tensor that
it saves: of a linear layer nothing, of experts or attention nearly all. So what is checkpointed here is what makes the
tensors; and where the module saves one of them, or a part of one, it saves how to get it instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Made = Mapping[str, Tensor | None]


def derived(make: Callable[[], Made], run: Callable[[Made], Any], others: Iterable[Tensor]) -> tuple[Any, bool]:
    """What `run` makes of the tensors that `make` makes, and True; or False, where these cannot be made again alone:
    one has no gradient, or is of a class of its own.

    Args:
        make: effective tensors by path; must make the same ones when it is called again, in backward.
        run: the forward with these tensors.
        others: tensors that live on anyway: the base's own, and the operators'.
    """
    paths: list[str] = []
    missing: dict[str, None] = {}

    def last() -> Any:
        made = make()
        paths[:] = [path for path, tensor in made.items() if tensor is not None]
        missing.update(dict.fromkeys(made.keys() - paths))
        return _Last.apply(*[made[path] for path in paths])  # type: ignore[no-untyped-call]

    tensors: tuple[Tensor, ...] = checkpoint(last, use_reentrant=False)
    if not all(type(each) is Tensor and each.requires_grad for each in tensors):
        return None, False
    living = {_memory(each) for each in others}
    places = {_memory(tensor): place for place, tensor in enumerate(tensors)}
    source = _Source(tensors[0].grad_fn)

    def pack(tensor: Tensor) -> Tensor | _Part:
        place = places.get(_memory(tensor))
        if place is None or _memory(tensor) in living:
            return tensor
        return _Part(source, place, tensor.size(), tensor.stride(), tensor.storage_offset())

    with saved_tensors_hooks(pack, _unpack):
        return run({**missing, **dict(zip(paths, tensors, strict=True))}), True


class _Last(torch.autograd.Function):
    """Saves the tensors, as the last of what the checkpoint saves."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients


class _Source:
    """The tensors as backward has made them. They go with the last of those who saved a part of them, each of which
    autograd lets go when it is through."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._tensors: tuple[Tensor, ...] | None = None

    def tensor(self, place: int) -> Tensor:
        if self._tensors is None:
            self._tensors = self._node.saved_tensors
        return self._tensors[place]


@dataclass(frozen=True, slots=True)
class _Part:
    """What is saved in place of a tensor, or of a view of it."""

    source: _Source
    place: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


def _unpack(saved: Tensor | _Part) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.source.tensor(saved.place).as_strided(saved.size, saved.stride, saved.offset)


def _memory(tensor: Tensor) -> int:
    """Tells memory apart, also where there are shapes only."""
    address: int = tensor.untyped_storage()._cdata
    return address
