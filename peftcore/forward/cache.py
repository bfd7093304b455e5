"""The effective-weight cache: values computed from tensors, kept while none of the tensors changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


class EffectiveWeightCache:
    """A cache of values by key, each with the tensors from which it was computed.

    In-place changes are known by version counters, other memory by its address. Writes through `.data` do not count;
    any forward with gradients clears the cache, so an optimizer that writes so is seen.
    """

    def __init__(self) -> None:
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
