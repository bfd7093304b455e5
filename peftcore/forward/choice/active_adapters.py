"""A choice: which injections are active, for which rows of a batch, and with which context and composition. A choice is
immutable. Its methods return changed copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from peftcore.contract.compositions import Composition
from peftcore.errors import RouteError

Active = tuple[str, ...]
Positions = tuple[int, ...]
Key = tuple[Active, Active | None, Composition | None]


@dataclass(frozen=True, eq=False)
class Route:
    """Assigns an injection to each row of a batch."""

    names: Active
    """The injections in the route, in the order in which they were applied."""
    index: Tensor
    """``[rows]`` int64: for each row, the position of its injection in `names`; -1 for the base model."""
    copies: int = 1
    """How many adjacent rows of the batch may share one entry of `index`, such as the beams of a prompt."""
    positions: tuple[int, ...] = ()
    """The values of `index` as Python integers, which can be read without synchronizing with the device."""
    since: tuple[int, ...] | None = None
    """For each row, the first column of tokens on which its injection acts. Earlier tokens run the base model. None if
    it acts on all tokens."""
    tokens: int = 0
    """The number of tokens per row of the batch, if the route assigns single tokens instead of whole rows; otherwise
    0."""
    seeds: tuple[int | None, ...] = ()
    """For each position in `names`, the seed from which the injection draws random numbers for its rows. None if it
    draws from torch's generators."""
    drew: set[str] = field(default_factory=set, repr=False)
    """The injections that have drawn from their seeds since the route was made."""
    _known: dict[Any, Tensor | None] = field(default_factory=dict, repr=False)
    _routes: dict[Any, Route] = field(default_factory=dict, repr=False)
    _last: dict[str, tuple[Any, Route]] = field(default_factory=dict, repr=False)

    def fits(self, batch: int) -> bool:
        """Whether a batch with this many rows matches the route, with or without copies of each row."""
        return batch in (len(self.index), len(self.index) * self.copies)

    def rows(self, count: int, device: torch.device) -> Tensor:
        """Returns `index` for `count` rows. If a module receives several rows for each row of the batch (windows, flat
        tokens), each entry is repeated.

        Raises:
            RouteError: `count` is not a multiple of the number of rows.
        """
        times, index = self._times(count), self.index.to(device)
        return index if times == 1 else index.repeat_interleave(times)

    def of(self, name: str, count: int, device: torch.device) -> Tensor:
        """Returns a mask ``[count]`` of bool, True for the rows of an injection.

        Raises:
            RouteError: `count` is not a multiple of the number of rows.
        """
        return self.rows(count, device) == self.names.index(name)

    def without(self, name: str) -> Route:
        """Returns the route in which the rows of one injection run the base model. All other rows are the same."""
        if name not in self.names:
            return self
        gone = self.names.index(name)
        left = tuple(each for each in self.names if each != name)
        with torch.inference_mode(False):  # a later forward may train
            index = torch.where(self.index == gone, -1, self.index - (self.index > gone).to(self.index.dtype))
        positions = tuple(-1 if each == gone else each - (each > gone) for each in self.positions)
        seeds = tuple(seed for each, seed in zip(self.names, self.seeds, strict=False) if each != name)
        return Route(left, index, self.copies, positions, self.since, seeds=seeds, drew=self.drew)

    def only(self, positions: Positions) -> Route:
        """Returns the route in which only some injections act. The rows of all others run the base model. `positions`
        contains their positions in `names`. The result is cached."""
        return self._with(("only", positions), tuple(each if each in positions else -1 for each in self.positions))

    def part(self, positions: Positions) -> Route:
        """Returns the route for the rows of some injections, without all other rows. `positions` contains their
        positions in `names`. The result is cached."""
        return self._with(("part", positions), tuple(each for each in self.positions if each in positions))

    def _with(self, key: tuple[str, Positions], positions: Positions) -> Route:
        if positions == self.positions:
            return self
        if key not in self._routes:
            with torch.inference_mode(False):  # a later forward may train
                index = torch.tensor(positions, device=self.index.device)
            tokens = self.tokens if len(positions) == len(self.positions) else 0
            routed = Route(self.names, index, self.copies, positions, self.since, tokens, self.seeds, self.drew)
            self._routes[key] = routed
        return self._routes[key]

    def by_tokens(self, held: int, new: int, batch: int) -> Route:
        """Returns a route of the single tokens of a forward, row by row. If all tokens of each row use the same
        injection, returns a route of whole rows.

        Args:
            held: the number of token columns in the cache.
            new: the number of token columns in this forward.
            batch: the number of rows of the batch, including copies.
        """
        assert self.since is not None
        starts = [min(max(start - held, 0), new) for start in self.since]
        key = tuple(starts), new, batch
        last = self._last.get("tokens")
        if last is not None and last[0] == key:
            return last[1]
        each = [
            [-1] * start + [position] * (new - start) for position, start in zip(self.positions, starts, strict=True)
        ]
        whole = all(start in (0, new) for start in starts)
        if whole:
            places = [row[0] for row in each]
        else:
            places = [place for row in each for _ in range(batch // len(each)) for place in row]
        with torch.inference_mode(False):  # a later forward may train
            index = torch.tensor(places, device=self.index.device)
        copies, tokens = (self.copies, 0) if whole else (1, new)
        found = Route(self.names, index, copies, tuple(places), None, tokens, self.seeds, self.drew)
        # The last one alone: all modules of a forward share it, and each length of a prompt would leave another.
        self._last["tokens"] = key, found
        return found

    def _times(self, count: int) -> int:
        times, rest = divmod(count, len(self.index))
        if rest:
            raise RouteError(
                f"a module received {count} rows, which is not a multiple of the route's {len(self.index)} rows: "
                "exclude it from the adapter's target modules"
            )
        return times

    @cached_property
    def present(self) -> Positions:
        """The positions in `names` of the injections that have rows, in order; -1 for the base model."""
        return tuple(sorted(set(self.positions)))

    @cached_property
    def sizes(self) -> Mapping[int, int]:
        """The number of rows of each injection, by its position in `names`."""
        return Counter(self.positions)

    def own(self, positions: Positions, count: int, device: torch.device) -> Tensor | None:
        """Returns the indices ``[rows]`` int64 of the rows of some injections, among `count` rows. The rows of the
        first injection are first, then those of the next. None if the result would be all rows in order.

        In a route of single tokens, `count` may also be the number of rows of the batch. Then each token has the index
        of its row.

        Args:
            positions: the positions of the injections in `names`.
            count: the number of rows.
            device: the device of the result.

        Raises:
            RouteError: `count` is not a multiple of the number of rows of the route.
        """
        if (positions, count, device) not in self._known:
            tokens = self.tokens if self.tokens and count * self.tokens == len(self.index) else 1
            lines = chain.from_iterable(self._lines(count * tokens)[each] for each in positions)
            rows = [line // tokens for line in lines]
            self._know((positions, count, device), None if rows == [*range(count)] else rows, device)
        return self._known[positions, count, device]

    def order(self, parts: tuple[Positions, ...], count: int, device: torch.device) -> Tensor | None:
        """Returns, for each of `count` rows, its index in the concatenation of some parts of the batch: ``[count]``
        int64. None if the concatenation is already in order. Each part contains the rows of one or more injections,
        given by their positions in `names`."""
        if (parts, count, device) not in self._known:
            joined = [*chain.from_iterable(self._lines(count)[each] for part in parts for each in part)]
            order = sorted(range(count), key=joined.__getitem__)
            self._know((parts, count, device), None if joined == [*range(count)] else order, device)
        return self._known[parts, count, device]

    def _lines(self, count: int) -> Mapping[int, list[int]]:
        each = [position for position in self.positions for _ in range(self._times(count))]
        found: dict[int, list[int]] = {position: [] for position in self.present}
        for row, position in enumerate(each):
            found[position].append(row)
        return found

    def _know(self, key: Any, rows: list[int] | None, device: torch.device) -> None:
        """Store row indices on a device, so that decoding does not copy them for each token."""
        with torch.inference_mode(False):  # a later forward may train
            self._known[key] = None if rows is None else torch.tensor(rows, device=device)


@dataclass(frozen=True, eq=False)
class Choice:
    """The active injections, with a route, context and composition.

    If there is a route or a composition, it determines which injections act. With a route, `active` contains the
    injections of the enclosing choice, which do not act. With a composition, a name that is not in `active` is ignored.
    """

    active: Active = ()
    route: Route | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    composition: Composition | None = None
    """How the active injections are combined. None if they act one after the other, in the order in which they were
    applied."""
    key: Key = field(init=False)
    """The key under which plans are stored. It does not contain the assignment of rows, so all assignments share one
    compiled graph."""
    named: Active = field(init=False)
    """All names in the choice: the injections that may act in a forward with this choice."""

    def __post_init__(self) -> None:
        routed = None if self.route is None else self.route.names
        object.__setattr__(self, "key", (self.active, routed, self.composition))
        composed = () if self.composition is None else tuple(self.composition.names())
        others = (*(routed or ()), *composed)
        named = tuple(dict.fromkeys((*self.active, *others))) if others else self.active
        object.__setattr__(self, "named", named)

    @property
    def acting(self) -> Active:
        """The names of the injections that act on at least one row."""
        return self.active if self.route is None else self.route.names

    @property
    def bound(self) -> Active:
        """The names in the route or composition. If one of them were removed from the model, the route or composition
        would fail."""
        if self.route is not None:
            return self.route.names
        return () if self.composition is None else tuple(self.composition.names())

    def without(self, name: str) -> Choice:
        """Returns the choice without one injection. Its rows of a route, or its parts of a composition, run the base
        model. All other injections act as before."""
        active = tuple([each for each in self.active if each != name])
        return replace(self, active=active, route=None if self.route is None else self.route.without(name))

    def same(self, other: Choice) -> bool:
        """Whether a forward computes the same result with either choice."""
        return self.key == other.key and self.route is other.route and self.context is other.context
