"""The journal: notes each write to a model before it is made, so that all of them can be undone together.

    with Journal() as journal:
        journal.put(module, "_parameters", "weight", new)
        journal.drop(module, "_buffers", "codes")

Where the block raises, Ctrl-C included, everything is as it was. A journal that is kept undoes its writes later; what
others have added to the same tables meanwhile stays. It holds modules and values alone, so a copy or a pickle of the
model can hold it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class Missing(Enum):
    """Stands for the value of a key that is not there. An enum, so that copies and pickles have the same one."""

    MISSING = 0


MISSING = Missing.MISSING


@dataclass(eq=False, slots=True)
class Entry(ABC):
    """One write: where, what was there before, and what was put there."""

    before: Any
    after: Any

    @abstractmethod
    def put(self, value: Any) -> None:
        """Write a value. Writing one that is there already changes nothing, so that undoing a write that was noted and
        never made is harmless."""

    @abstractmethod
    def again(self, journal: Journal) -> None:
        """Write what was there before, as a write of another journal."""


@dataclass(eq=False, slots=True)
class InTable(Entry):
    """A write to a dictionary: an attribute of the holder, or with an empty name its own ``__dict__``."""

    holder: Any
    name: str
    key: Any
    order: tuple[Any, ...]
    """The keys by which the table is sorted where the key comes back; others follow."""

    def put(self, value: Any) -> None:
        table = table_of(self.holder, self.name)
        if value is MISSING:
            table.pop(self.key, None)
        elif self.key in table or not (self.name and self.order):  # attributes have no order that matters
            table[self.key] = value
        else:
            place = {key: index for index, key in enumerate(self.order)}
            entries = sorted({**table, self.key: value}.items(), key=lambda each: place.get(each[0], len(place)))
            if isinstance(table, OrderedDict):  # of hooks: their handles hold the table itself
                table[self.key] = value
                for key, _ in entries:
                    table.move_to_end(key)
            else:
                vars(self.holder)[self.name] = dict(entries)  # in one step: nothing is lost in between

    def again(self, journal: Journal) -> None:
        journal.put(self.holder, self.name, self.key, self.before, self.order)


@dataclass(eq=False, slots=True)
class Attribute(Entry):
    """A write by ``setattr``, for classes that keep more in step with an attribute."""

    holder: Any
    name: str

    def put(self, value: Any) -> None:
        setattr(self.holder, self.name, value)

    def again(self, journal: Journal) -> None:
        journal.set(self.holder, self.name, self.before)


@dataclass(eq=False, slots=True)
class Values(Entry):
    """A write to the values of a tensor, which stays the same object."""

    tensor: Tensor

    def put(self, value: Any) -> None:
        with torch.no_grad():
            self.tensor.copy_(value)

    def again(self, journal: Journal) -> None:
        journal.write(self.tensor, self.before)


@dataclass(eq=False, slots=True)
class Call(Entry):
    """A write by a function of the holder and a value."""

    function: Callable[[Any, Any], object]
    holder: Any

    def put(self, value: Any) -> None:
        self.function(self.holder, value)

    def again(self, journal: Journal) -> None:
        journal.call(self.function, self.holder, self.after, self.before)


class Journal:
    """The writes of one change. As a context manager, it undoes them where the block raises."""

    def __init__(self) -> None:
        self.entries: list[Entry | Journal] = []
        self._afterwards: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def put(self, holder: Any, table: str, key: Any, value: Any, order: tuple[Any, ...] = ()) -> None:
        """Put a value into a dictionary of the holder: its attribute `table`, or with "" its own ``__dict__``. A new
        key comes last, or first when `order` is that key alone."""
        there = table_of(holder, table)
        before = there.get(key, MISSING)
        if before is not value:
            self._do(InTable(before, value, holder, table, key, order or tuple(there if before is not MISSING else ())))

    def drop(self, holder: Any, table: str, key: Any) -> None:
        """Take a key out of a dictionary of the holder, if it is there; undone, it comes back to its place."""
        self.put(holder, table, key, MISSING)

    def set(self, holder: Any, name: str, value: Any) -> None:
        """Set an attribute that the holder has."""
        self._do(Attribute(getattr(holder, name), value, holder, name))

    def note(self, holder: Any) -> None:
        """Note the attributes that an object has, before code that knows no journal sets them."""
        self.entries += [InTable(value, value, holder, "", key, ()) for key, value in vars(holder).items()]

    def write(self, tensor: Tensor, values: Tensor, before: Tensor | None = None) -> None:
        """Write values into a tensor; `before` is a copy of the present ones, made here where it is not given."""
        self._do(Values(tensor.clone() if before is None else before, values, tensor))

    def call(self, function: Callable[[Any, Any], object], holder: Any, before: Any, after: Any) -> None:
        """Call ``function(holder, after)``, which ``function(holder, before)`` undoes."""
        self._do(Call(before, after, function, holder))

    def afterwards(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function at the end of an undoing, as one that makes anew what is derived from what was written."""
        self._afterwards.append((function, args))

    def part(self) -> Journal:
        """Returns a journal whose writes are undone with those of this one. It can be kept by itself."""
        part = Journal()
        self.entries.append(part)
        return part

    def undo(self, journal: Journal | None = None) -> None:
        """Undo the writes, the last one first. With another journal, which notes that, the undoing can be undone."""
        if journal is not None:
            journal._afterwards += self._afterwards
        for each in reversed(self.entries):
            if isinstance(each, Journal):
                each.undo(journal)
            elif journal is None:
                each.put(each.before)
            else:
                each.again(journal)
        for function, args in self._afterwards:
            function(*args)

    def _do(self, entry: Entry) -> None:
        self.entries.append(entry)  # first, so that it is undone also where the write is interrupted
        entry.put(entry.after)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            self.undo()


def table_of(holder: Any, name: str) -> dict[Any, Any]:
    """Returns a dictionary that the holder has as an attribute of its own, or with an empty name its ``__dict__``."""
    table: dict[Any, Any] = vars(holder)[name] if name else vars(holder)
    return table
