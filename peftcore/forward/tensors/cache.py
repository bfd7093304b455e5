"""Caches values computed from weights, such as effective weights, while the weights are known not to change: within one
call of `generate`, and within `cache_weights`.

Everywhere else each forward computes them again, because some writes to a weight cannot be detected: through `.data`, a
numpy view, a fused optimizer or a collective operation. If the user has not promised that the weights do not change, a
cached value could then be wrong without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor


class WeightCache:
    """Stores values by key, each with the tensors from which it was computed. The cache is cleared at the end of the
    block that opened it.

    It still detects replaced tensors, and changes that torch's version counter records.
    """

    def __init__(self) -> None:
        self.open = True
        self._values: dict[Hashable, tuple[Any, tuple[object, ...], Any]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, what: Hashable, sources: Sequence[Tensor], under: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """Returns the cached value, or calls `make` and caches its result.

        Args:
            what: the key. For each key, only the last value is kept.
            sources: the tensors from which `make` computes the value.
            under: other objects that the value depends on, compared by identity.
            make: computes the value, without gradients.
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
"""The caches of this thread or task, each with the host state to which it belongs."""


def open_cache(state: object) -> WeightCache | None:
    """Returns the open cache of a host in this thread or task; otherwise None."""
    for owner, cache in _OPEN.get():
        if owner is state and cache.open:
            return cache
    return None


@contextmanager
def caching(states: Iterable[object]) -> Iterator[None]:
    """Context manager that caches the values computed from the weights of the given hosts until the end of the block. A
    nested block uses the cache of the outer block."""
    new = [(state, WeightCache()) for state in states if open_cache(state) is None]
    token = None
    try:
        token = _OPEN.set((*_OPEN.get(), *new))
        yield
    finally:
        for _, cache in new:
            cache.clear()
            cache.open = False  # a task that was started in the block has the block's context, and may outlive it
        with suppress(ValueError):  # left in another context than entered, where nothing is to be restored
            if token is not None:
                _OPEN.reset(token)
