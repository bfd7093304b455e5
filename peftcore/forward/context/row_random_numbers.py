"""Random numbers in a batch whose rows use different adapters. Each adapter draws the same dropout as if it ran alone.

Operators draw with torch's functions (``F.dropout``, ``nn.Dropout``). If a route has a seed for an adapter, the numbers
for its rows depend only on the seed, the path of the module, the row's number among the adapter's rows and the position
in the row (see `peftcore.forward.context.counter_based_random`). Other rows and padding at the end of rows do not
change them. Random functions that are not replaced in this way use torch's global generators. These are reseeded for
the adapter and restored afterwards.

No counter continues from module to module. So modules that backward runs again draw the same numbers, and so does
training resumed from a file. A module that runs several times in one forward draws the same numbers each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftcore.forward.context.counter_based_random import CountedDraws, mixed

if TYPE_CHECKING:
    from peftcore.forward.choice.active_adapters import Positions, Route
    from peftcore.forward.context.context import ForwardContext


class Streams:
    """The global generators from which operators on a device draw: the generator of the CPU, and the generator of the
    device."""

    def __init__(self, device: torch.device) -> None:
        kind: Any = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
        self._device, self._own = device, kind

    def states(self) -> list[Tensor]:
        """Returns the states of the generators."""
        return [torch.get_rng_state(), *([] if self._own is None else [self._own.get_rng_state(self._device)])]

    def set(self, states: list[Tensor]) -> None:
        """Restore the states of the generators."""
        torch.set_rng_state(states[0])
        if self._own is not None:
            self._own.set_rng_state(states[1], self._device)

    def seed(self, seed: int) -> None:
        """Reseed the generators."""
        torch.default_generator.manual_seed(seed)
        if self._own is not None:  # by a generator: functions that seed take the current device, which is another one
            self._own.set_rng_state(torch.Generator(self._device).manual_seed(seed).get_state(), self._device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context manager in which the global generators are reseeded; their states are restored afterwards."""
    streams = Streams(device)
    before = streams.states()
    try:
        streams.seed(seed)
        yield
    finally:
        streams.set(before)


@contextmanager
def draws_of(context: ForwardContext, route: Route, position: int, site: str, alone: bool) -> Iterator[None]:
    """Context manager in which an adapter of a route draws from its seed, if the route has one for it.

    Args:
        context: the forward's context. It stores the states of the model's generators.
        route: the route.
        position: the position of the adapter in the route; -1 for the base model, which draws from the global
            generators.
        site: the path of the module and the kind of operation. Random numbers depend on them too.
        alone: whether the adapter receives only its rows, and not all rows of the batch.
    """
    seed = route.seeds[position] if route.seeds and position >= 0 else None
    if seed is None or torch.compiler.is_compiling():
        yield
        return
    streams, outer = Streams(route.index.device), context.drawn
    before = streams.states()
    own = mixed(seed, site, *([context.number] if context.number else ()))  # a pass of `again` draws anew
    count = route.sizes[position]
    draws = CountedDraws(own, range(count) if alone else _numbers(route.positions, position), count)
    try:
        context.drawn = streams, before if outer is None else outer[1], draws
        if outer is not None:
            outer[2].rests = True
        streams.seed(own)
        with draws:
            yield
    finally:
        context.drawn = outer
        if draws.count:
            route.drew.add(route.names[position])
        if outer is not None:
            outer[2].rests = False
        streams.set(before)


def _numbers(positions: Positions, own: int) -> list[int]:
    """Returns, for each row, the number of earlier rows at the position `own`. Values for rows of other positions are
    not used."""
    return [positions[:row].count(own) for row in range(len(positions))]


@contextmanager
def own_draws_aside(context: ForwardContext) -> Iterator[None]:
    """Context manager in which the model draws from its own generators. Used inside `draws_of`."""
    assert context.drawn is not None
    streams, before, draws = context.drawn
    mine, context.drawn, draws.rests = streams.states(), None, True
    streams.set(before)
    try:
        with draws.out():
            yield
    finally:
        # In place: what the adapter's block puts back at its end is this list.
        before[:] = streams.states()
        context.drawn, draws.rests = (streams, before, draws), False
        streams.set(mine)
