"""A choice: which injections are active, on which rows of a batch, in what context and composition. It is a value: what
is changed in it leaves the rest as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from peftcore.contract.compositions import Composition
from peftcore.errors import RouteError

Active = tuple[str, ...]
Key = tuple[Active, Active | None, Composition | None]


@dataclass(frozen=True, eq=False)
class Route:
    """A different injection for each row of a batch."""

    names: Active
    """The injections that occur, in the order in which they were applied."""
    index: Tensor
    """[rows] int64: the row's position in `names`, -1 for the bare base model."""
    copies: int = 1
    """The number of adjacent rows of the batch that may belong to one of these (beams)."""
    positions: tuple[int, ...] = ()
    """`index` as numbers, which are known without asking the device."""
    _groups: dict[tuple[int, torch.device], tuple[dict[int, Tensor], Tensor]] = field(default_factory=dict, repr=False)

    def fits(self, batch: int) -> bool:
        """Whether a batch of the host has this many rows."""
        return batch in (len(self.index), len(self.index) * self.copies)

    def rows(self, count: int, device: torch.device) -> Tensor:
        """Returns the index for `count` rows, each entry repeated where a module sees several rows of each (windows,
        flat tokens).

        Raises:
            RouteError: `count` is no multiple of the rows.
        """
        times, index = self._times(count), self.index.to(device)
        return index if times == 1 else index.repeat_interleave(times)

    def of(self, name: str, count: int, device: torch.device) -> Tensor:
        """Returns which of `count` rows are those of an injection: ``[count]`` of bool.

        Raises:
            RouteError: as `rows`.
        """
        return self.rows(count, device) == self.names.index(name)

    def without(self, name: str) -> Route:
        """Returns the route in which the rows of an injection run the bare base model; all others stay as they are."""
        if name not in self.names:
            return self
        gone = self.names.index(name)
        left = tuple(each for each in self.names if each != name)
        with torch.inference_mode(False):  # a later forward may train
            index = torch.where(self.index == gone, -1, self.index - (self.index > gone).to(self.index.dtype))
        positions = tuple(-1 if each == gone else each - (each > gone) for each in self.positions)
        return Route(left, index, self.copies, positions)

    def _times(self, count: int) -> int:
        times, rest = divmod(count, len(self.index))
        if rest:
            raise RouteError(f"a module got {count} rows, which cannot be told apart by a route of {len(self.index)}")
        return times

    def groups(self, count: int, device: torch.device) -> tuple[dict[int, Tensor], Tensor]:
        """Returns, for `count` rows, the rows of each position that has any (-1: the bare base model), and where each
        row lies when these are concatenated. Computed once, so that no token waits for it.

        Raises:
            RouteError: `count` is no multiple of the rows.
        """
        if (count, device) not in self._groups:
            each = [position for position in self.positions for _ in range(self._times(count))]
            rows = {own: [n for n, position in enumerate(each) if position == own] for own in sorted(set(each))}
            order = sorted(range(count), key=[*chain.from_iterable(rows.values())].__getitem__)
            with torch.inference_mode(False):  # a later forward may train
                places = {own: torch.tensor(found, device=device) for own, found in rows.items()}
                self._groups[count, device] = places, torch.tensor(order, device=device)
        return self._groups[count, device]


@dataclass(frozen=True, eq=False)
class Choice:
    """The active injections, with a route, context and composition.

    A route or composition says all that acts. With a route, `active` is what acts outside of it; with a composition,
    the parts of a name that is not in `active` run the bare base model.
    """

    active: Active = ()
    route: Route | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    composition: Composition | None = None
    """How the active ones act together; None: in the order in which they were applied."""
    key: Key = field(init=False)
    """The key of plans: it leaves out the assignment of rows, so that all assignments share one compiled graph."""
    named: Active = field(init=False)
    """All names in it: what may act in any forward under it."""

    def __post_init__(self) -> None:
        routed = None if self.route is None else self.route.names
        object.__setattr__(self, "key", (self.active, routed, self.composition))
        composed = () if self.composition is None else tuple(self.composition.names())
        others = (*(routed or ()), *composed)
        named = tuple(dict.fromkeys((*self.active, *others))) if others else self.active
        object.__setattr__(self, "named", named)

    @property
    def acting(self) -> Active:
        """The names that act on any row."""
        return self.active if self.route is None else self.route.names

    @property
    def bound(self) -> Active:
        """The names that a route or a composition stands on: none can be taken from the model without breaking it."""
        if self.route is not None:
            return self.route.names
        return () if self.composition is None else tuple(self.composition.names())

    def without(self, name: str) -> Choice:
        """Returns the choice in which an injection acts nowhere: its rows of a route and its parts of a composition run
        the bare base model, and all others stay as they are."""
        active = tuple([each for each in self.active if each != name])
        return replace(self, active=active, route=None if self.route is None else self.route.without(name))

    def same(self, other: Choice) -> bool:
        """Whether two forwards under these choices compute the same."""
        return self.key == other.key and self.route is other.route and self.context is other.context
