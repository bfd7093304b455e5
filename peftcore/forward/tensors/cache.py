"""Values computed from weights, such as effective weights, kept for as long as somebody says that nothing writes to the
weights: within one call of `generate`, and within `cache_weights`.

Everywhere else each forward computes them anew. Whoever writes to a weight may do it so that nobody sees it: through
`.data`, a numpy view, a fused optimizer, a collective. A value that is kept longer than somebody promises would then be
wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor


class WeightCache:
    """Values by key, each with the tensors from which it was computed. It ends with the block that opened it.

    A change that torch counts, or another tensor in the place of one, is seen all the same.
    """

    def __init__(self) -> None:
        self.open = True
        self._values: dict[Hashable, tuple[Any, tuple[object, ...], Any]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, what: Hashable, sources: Sequence[Tensor], under: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """Returns the cached value, or the result of `make`, which is then cached.

        Args:
            what: the key; the cache keeps the last value of each.
            sources: the tensors from which `make` computes it.
            under: objects on which it depends besides, compared by identity.
            make: computes it, without gradients.
        """
        if any(map(Tensor.is_inference, sources)):  # they count no changes
            return make()
        under = (*under, torch.is_inference_mode_enabled())
        kept = self._values.get(what)
        if kept is None or not _same(kept[0], sources, kept[1], under):
            # The tensors themselves: an address and an identity may be another's, once these are gone.
            seen = [(source, source._version, source.data_ptr()) for source in sources]
            kept = self._values[what] = (seen, under, make())
        return kept[2]

    def clear(self) -> None:
        """Drop all values."""
        self._values.clear()


def _same(
    seen: Sequence[tuple[Tensor, int, int]],
    sources: Sequence[Tensor],
    before: tuple[object, ...],
    under: tuple[object, ...],
) -> bool:
    if len(seen) != len(sources):
        return False
    for source, (known, version, place) in zip(sources, seen, strict=True):
        if source is not known or source._version != version or source.data_ptr() != place:
            return False
    return all(one is other for one, other in zip(before, under, strict=True))


_OPEN: ContextVar[tuple[tuple[object, WeightCache], ...]] = ContextVar("open_caches", default=())
"""The caches of this thread or task, each with the host state that it belongs to."""


def open_cache(state: object) -> WeightCache | None:
    """Returns the cache of a host in this thread or task; None outside of all blocks."""
    for owner, cache in _OPEN.get():
        if owner is state and cache.open:
            return cache
    return None


@contextmanager
def caching(states: Iterable[object]) -> Iterator[None]:
    """Keep what is computed from the weights of these hosts until the end of the block. A block inside another one goes
    on with the cache of the outer one."""
    new = [(state, WeightCache()) for state in states if open_cache(state) is None]
    token = _OPEN.set((*_OPEN.get(), *new))
    try:
        yield
    finally:
        for _, cache in new:
            cache.clear()
            cache.open = False  # a task that was started in the block has the block's context, and may outlive it
        with suppress(ValueError):  # left in another context than entered, where nothing is to be restored
            _OPEN.reset(token)
