"""Selects the rows of one member from the output of a forward that all members share.

Two small forwards with different numbers of rows show which dimensions index the rows: those whose size changes. If an
output cannot be cut into rows, a loss that reads it raises an error with the name of the output.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from peftcore.errors import TrainingError

FEW, MORE = 2, 3
"""The numbers of rows of the two forwards from which the dimensions are learned."""
Dims = tuple[int, ...]
PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, type(None))


class NotCut:
    """Replaces an output that cannot be cut into the rows of single members. Every use of it raises an error."""

    def __init__(self, name: str, why: str) -> None:
        self.__dict__["_error"] = (
            f"the loss of a member reads {name} of the model's output, which {why}: compute the loss from other "
            "outputs, or train the adapter outside the fleet"
        )

    def _raise(self, *_: Any, **__: Any) -> NoReturn:
        raise TrainingError(self.__dict__["_error"])

    __getattr__ = __setattr__ = __getitem__ = __iter__ = __len__ = __bool__ = __call__ = __float__ = __int__ = _raise
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = _raise
    __rmatmul__ = __neg__ = __pow__ = __rpow__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _raise
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"NotCut({self.__dict__['_error']!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        given = [*args, *(kwargs or {}).values()]
        flat = [each for value in given for each in (value if isinstance(value, list | tuple) else [value])]
        next(each for each in flat if isinstance(each, cls))._raise()


class Outputs:
    """Stores which dimensions of a model's outputs index the rows of the batch, by the output's name and kind."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], Dims | str] = {}

    @property
    def learned(self) -> bool:
        """Whether the row dimensions of an output are known."""
        return bool(self._known)

    def know(self, output: Any) -> bool:
        """Whether the row dimensions of all entries of this output are known."""
        return all(key in self._known for key, _ in _leaves(output, self._is_cut))

    def learn(self, few: Any, more: Any) -> None:
        """Find the row dimensions by comparing two outputs of the model: one for `FEW` rows, the other for the same
        rows and one more.

        Raises:
            TrainingError: the two outputs have entries of different names.
        """
        for (name, kind), dims in _compared(few, more):
            self._known[name, kind] = dims

    def _is_cut(self, key: tuple[str, int]) -> bool:
        return self._known.get(key, ()) == (0,)

    def part(self, output: Any, start: int, stop: int, rows: int) -> Any:
        """Returns the rows from `start` to `stop` of an output that has `rows` rows. All dimensions that index rows are
        cut, also in nested containers. Values without rows are returned unchanged.
        """
        return self._part(output, start, stop, rows, "")

    def _part(self, value: Any, start: int, stop: int, rows: int, name: str) -> Any:
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, Tensor):
            dims = self._known[name, value.dim()]
            if isinstance(dims, str):
                return NotCut(name or "all", dims)
            for dim in dims:
                if value.shape[dim] != rows:
                    return NotCut(name or "all", f"has {value.shape[dim]} rows where the batch has {rows}")
                value = value.narrow(dim, start, stop - start)
            return value
        parts = _children(value, name)
        if parts is None:
            return NotCut(name or "all", f"is a {type(value).__name__}")
        if isinstance(value, list | tuple) and (known := self._known.get((name, LIST), ())):
            if isinstance(known, str) or len(value) != rows:
                return NotCut(name, known if isinstance(known, str) else f"has {len(value)} entries")
            return value[start:stop] if type(value) in (list, tuple) else NotCut(name, f"is a {type(value).__name__}")
        own = {key: self._part(each, start, stop, rows, below) for key, (below, each) in parts.items()}
        return _rebuilt(value, own)


LIST = -1
"""The kind of a list; the kind of a tensor is its number of dimensions."""


def _children(value: Any, name: str) -> dict[Any, tuple[str, Any]] | None:
    """Returns the contents of a container with their names. None if it is not a container, or not one that `_rebuilt`
    supports."""
    if isinstance(value, Mapping):
        return {key: (f"{name}.{key}".lstrip("."), each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return {key: (f"{name}[{key}]", each) for key, each in enumerate(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [each.name for each in dataclasses.fields(value) if each.init]
        return {key: (f"{name}.{key}".lstrip("."), getattr(value, key)) for key in fields}
    return None


def _rebuilt(value: Any, parts: Mapping[Any, Any]) -> Any:
    """Returns a container of the same kind with other contents."""
    if isinstance(value, Mapping):
        return dict(parts) if type(value) is dict else type(value)(**parts)
    if isinstance(value, list | tuple):
        return type(value)(parts.values()) if type(value) in (list, tuple) else type(value)(*parts.values())
    return dataclasses.replace(value, **parts)


def _leaves(
    value: Any, is_cut: Callable[[tuple[str, int]], bool], name: str = ""
) -> Iterator[tuple[tuple[str, int], Any]]:
    """Yields the tensors and lists of an output with their names and kinds. The contents of lists that are cut into
    rows are left out."""
    if isinstance(value, Tensor):
        yield (name, value.dim()), value
    elif not isinstance(value, PLAIN) and (parts := _children(value, name)) is not None:
        if isinstance(value, list | tuple):
            yield (name, LIST), value
            if is_cut((name, LIST)):
                return
        for below, each in parts.values():
            yield from _leaves(each, is_cut, below)


def _compared(few: Any, more: Any, name: str = "") -> Iterator[tuple[tuple[str, int], Dims | str]]:
    """Yields the dimensions that index rows, for each tensor and list of two outputs, by name and kind. If they cannot
    be determined, yields the reason as a string."""
    if isinstance(few, Tensor) and isinstance(more, Tensor):
        yield (name, few.dim()), _dims(few, more)
        return
    if isinstance(few, PLAIN) or (parts := _children(few, name)) is None:
        return
    others = _children(more, name) if type(more) is type(few) else None
    if isinstance(few, list | tuple) and others is not None and len(others) != len(parts):
        known = len(parts) == FEW and len(others) == MORE
        yield (name, LIST), (0,) if known else f"has {len(parts)} entries for {FEW} rows, and {len(others)} for {MORE}"
        return
    if others is None or others.keys() != parts.keys():
        raise TrainingError(
            f"the model's output has other contents for {FEW} rows than for {MORE} ({name or 'as a whole'}), so the "
            "rows of members in it are not known: train the adapters one by one"
        )
    if isinstance(few, list | tuple):
        yield (name, LIST), ()
    for key, (below, each) in parts.items():
        yield from _compared(each, others[key][1], below)


def _dims(few: Tensor, more: Tensor) -> Dims | str:
    if few.dim() != more.dim():
        return f"has {few.dim()} dimensions for {FEW} rows, and {more.dim()} for {MORE}"
    moved = [dim for dim in range(few.dim()) if few.shape[dim] != more.shape[dim]]
    if any((few.shape[dim], more.shape[dim]) != (FEW, MORE) for dim in moved):
        return (
            f"has entries for several rows or dimensions: {tuple(few.shape)} for {FEW}, {tuple(more.shape)} for {MORE}"
        )
    if not moved and not _alike(few, more):
        return "is one value computed from the rows of all members"
    return tuple(moved)


def _alike(few: Tensor, more: Tensor) -> bool:
    """Whether two outputs without rows are the same, up to rounding."""
    if few.dtype != more.dtype or few.is_meta:
        return few.is_meta
    if few.is_floating_point() or few.is_complex():
        return torch.allclose(few, more, rtol=1e-3, atol=1e-6, equal_nan=True)
    return torch.equal(few, more)
