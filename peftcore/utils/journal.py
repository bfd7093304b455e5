"""Records each change of a model before it is made, so that all changes can be undone together:

    with Journal() as journal:
        journal.put(module, "_parameters", "weight", new)
        journal.drop(module, "_buffers", "codes")

If the block raises an error or is interrupted, all changes are undone; with `temporary`, they are always undone at the
end. A journal can also be kept and undone later. Entries that other code has added to the same dictionaries in between
are not removed. A journal contains only modules and values, so it can be copied and pickled with the model.
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
    """The type of the value for a missing key. It is an enum, so that copies and pickles have the same object."""

    MISSING = 0


MISSING = Missing.MISSING


@dataclass(eq=False, slots=True)
class Entry(ABC):
    """One recorded change: its place, the value before and the value after."""

    before: Any
    after: Any

    @abstractmethod
    def put(self, value: Any) -> None:
        """Set the value at the place of this entry. Setting the present value changes nothing, so undoing a recorded
        change that was never made is harmless."""

    @abstractmethod
    def again(self, journal: Journal) -> None:
        """Restore the value before, as a change that another journal records."""


@dataclass(eq=False, slots=True)
class InTable(Entry):
    """A change of a dictionary: the holder's attribute `name`, or the holder's ``__dict__`` if `name` is empty."""

    holder: Any
    name: str
    key: Any
    order: tuple[Any, ...]
    """The order of the dictionary's keys after the key is restored. Keys that are not in `order` are last."""

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
    """A change by ``setattr``, for classes that update other state when the attribute is set."""

    holder: Any
    name: str

    def put(self, value: Any) -> None:
        setattr(self.holder, self.name, value)

    def again(self, journal: Journal) -> None:
        journal.set(self.holder, self.name, self.before)


@dataclass(eq=False, slots=True)
class Values(Entry):
    """A change of the values of a tensor, which remains the same object."""

    tensor: Tensor

    def put(self, value: Any) -> None:
        with torch.no_grad():
            self.tensor.copy_(value)

    def again(self, journal: Journal) -> None:
        journal.write(self.tensor, self.before)


@dataclass(eq=False, slots=True)
class Call(Entry):
    """A change by calling a function with the holder and a value."""

    function: Callable[[Any, Any], object]
    holder: Any

    def put(self, value: Any) -> None:
        self.function(self.holder, value)

    def again(self, journal: Journal) -> None:
        journal.call(self.function, self.holder, self.after, self.before)


class Journal:
    """A list of recorded changes. As a context manager, it undoes them if the block raises an error; with `temporary`,
    always."""

    def __init__(self, temporary: bool = False) -> None:
        self.temporary = temporary
        self.entries: list[Entry | Journal] = []
        self._afterwards: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def put(self, holder: Any, table: str, key: Any, value: Any, order: tuple[Any, ...] = ()) -> None:
        """Put a value into a dictionary: the holder's attribute `table`, or the holder's ``__dict__`` if `table` is
        empty. A new key becomes the last one, or the first one if `order` contains only this key."""
        there = table_of(holder, table)
        before = there.get(key, MISSING)
        if before is not value:
            self._do(InTable(before, value, holder, table, key, order or tuple(there if before is not MISSING else ())))

    def drop(self, holder: Any, table: str, key: Any) -> None:
        """Remove a key from a dictionary of the holder, if the dictionary has it. Undoing restores the key at its
        position."""
        self.put(holder, table, key, MISSING)

    def set(self, holder: Any, name: str, value: Any) -> None:
        """Set an existing attribute of the holder."""
        self._do(Attribute(getattr(holder, name), value, holder, name))

    def note(self, holder: Any) -> None:
        """Record the present attributes of an object, before code that does not use the journal changes them."""
        self.entries += [InTable(value, value, holder, "", key, ()) for key, value in vars(holder).items()]

    def write(self, tensor: Tensor, values: Tensor, before: Tensor | None = None) -> None:
        """Write values into a tensor. `before` is a copy of the present values; if it is None, the copy is made
        here."""
        self._do(Values(tensor.clone() if before is None else before, values, tensor))

    def call(self, function: Callable[[Any, Any], object], holder: Any, before: Any, after: Any) -> None:
        """Call ``function(holder, after)``. Undoing calls ``function(holder, before)``."""
        self._do(Call(before, after, function, holder))

    def afterwards(self, function: Callable[..., object], *args: Any) -> None:
        """Register a function to call after undoing, such as one that recomputes values which depend on the changed
        ones."""
        self._afterwards.append((function, args))

    def part(self) -> Journal:
        """Returns a new journal whose changes are undone together with those of this journal. It can also be undone
        separately."""
        part = Journal()
        self.entries.append(part)
        return part

    def undo(self, journal: Journal | None = None) -> None:
        """Undo the changes, the last one first. If another journal is passed, it records the undoing, so that this can
        be undone too."""
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
        if error is not None or self.temporary:
            try:
                self.undo()
            except BaseException:  # interrupted, maybe in the middle
                self.undo()
                raise


def table_of(holder: Any, name: str) -> dict[Any, Any]:
    """Returns a dictionary that is an attribute of the holder, or its ``__dict__`` if the name is empty."""
    table: dict[Any, Any] = vars(holder)[name] if name else vars(holder)
    return table
