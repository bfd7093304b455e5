"""Random numbers where rows of a batch go to different adapters: what an adapter drops is what it would drop alone.

Operators draw from torch's global generators (``F.dropout``, ``nn.Dropout``). Where a route has a seed for an adapter,
these are seeded anew for its rows at each module, by that seed and the module's path, and go on afterwards where they
were. Nothing is counted on the way, so what backward runs again draws the same, and so does a training that goes on
from a file. A module that runs several times in one forward draws the same each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peftcore.forward.active_adapters import Route
    from peftcore.forward.context import ForwardContext


def mixed(seed: int, *parts: object) -> int:
    """Returns a seed for one of the things that a seed stands for: a whole number from 0 to 2**63 - 1."""
    text = "\0".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Streams:
    """The global generators from which operators on a device draw: that of the CPU, and the device's own."""

    def __init__(self, device: torch.device) -> None:
        kind: Any = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
        self._device, self._own = device, kind

    def states(self) -> list[Tensor]:
        """Returns where they are."""
        return [torch.get_rng_state(), *([] if self._own is None else [self._own.get_rng_state(self._device)])]

    def set(self, states: list[Tensor]) -> None:
        """Put them back to where they were."""
        torch.set_rng_state(states[0])
        if self._own is not None:
            self._own.set_rng_state(states[1], self._device)

    def seed(self, seed: int) -> None:
        """Begin them anew."""
        torch.default_generator.manual_seed(seed)
        if self._own is not None:  # by a generator: functions that seed take the current device, which is another one
            self._own.set_rng_state(torch.Generator(self._device).manual_seed(seed).get_state(), self._device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context manager in which the global generators begin anew; they go on afterwards where they were."""
    streams = Streams(device)
    before = streams.states()
    streams.seed(seed)
    try:
        yield
    finally:
        streams.set(before)


@contextmanager
def draws_of(context: ForwardContext, route: Route, position: int, site: str) -> Iterator[None]:
    """Context manager in which an adapter of a route draws by its own seed, where the route has one for it.

    Args:
        context: the forward's context; it keeps where the model's own generators were.
        route: the route.
        position: that of the adapter in the route; -1 for the bare base model, which draws as it always does.
        site: the module, and what the adapter does there.
    """
    seed = route.seeds[position] if route.seeds and position >= 0 else None
    if seed is None or torch.compiler.is_compiling():
        yield
        return
    streams = Streams(route.index.device)
    before, outer = streams.states(), context.drawn
    if outer is None:
        context.drawn = streams, before
    # A pass of `ForwardContext.again` draws anew.
    streams.seed(mixed(seed, site, *([context.number] if context.number else ())))
    try:
        yield
    finally:
        context.drawn = outer
        streams.set(before)


@contextmanager
def own_draws_aside(context: ForwardContext) -> Iterator[None]:
    """Context manager in which the model itself draws, in the middle of what an adapter of a route does by its own
    seed."""
    assert context.drawn is not None
    streams, before = context.drawn
    mine, context.drawn = streams.states(), None
    streams.set(before)
    try:
        yield
    finally:
        # In place: what the adapter's block puts back at its end is this list.
        before[:] = streams.states()
        context.drawn = streams, before
        streams.set(mine)
