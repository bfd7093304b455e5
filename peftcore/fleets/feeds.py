"""Iterates over the batches of one adapter's data, for one or several epochs. The order depends only on the adapter's
seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import TrainingError
from peftcore.forward.context.counter_based_random import mixed
from peftcore.forward.context.row_random_numbers import Streams

Data = Iterable[Mapping[str, Any]] | Callable[[int], Iterable[Mapping[str, Any]]]
"""Batches, or a function that returns the batches of an epoch, given the epoch's number."""


class Feed:
    """The batches of one adapter.

    Random draws of the data, such as the order of a `DataLoader` that shuffles, depend only on the seed and the epoch.
    They do not advance torch's global generators.

    Attributes:
        epoch: the number of finished epochs.
        position: the number of batches taken in the current epoch.
    """

    def __init__(self, data: Data, seed: int, once: bool) -> None:
        """If `once` is True, the data ends after the first epoch."""
        self._data, self._seed, self._once = data, seed, once
        self._streams = Streams(torch.device("cpu"))
        self._iterator: Iterator[Mapping[str, Any]] | None = None
        self._states: list[Tensor] = []
        self.epoch = self.position = 0
        self.ended = False

    def take(self) -> Mapping[str, Any] | None:
        """Returns the next batch; None after the last one."""
        while not self.ended:
            if self._iterator is None:
                self._begin()
            batch: Mapping[str, Any] | None = self._drawn(lambda: next(self._iterator, None))  # type: ignore[arg-type]
            if batch is not None:
                self.position += 1
                return batch
            self.ended = self._once or not self.position  # an iterator that can be gone through once
            self.epoch, self.position, self._iterator = self.epoch + 1, 0, None
        return None

    def go_to(self, epoch: int, position: int) -> None:
        """Advance to an epoch and a position in it, such as those that a checkpoint stores.

        Raises:
            TrainingError: the epoch has fewer batches than `position`.
        """
        self.epoch, self.position, self._iterator, self.ended = epoch, 0, None, self._once and epoch > 0
        while self.position < position:
            if self.take() is None or self.epoch != epoch:
                raise TrainingError(
                    f"the data has fewer batches than the {position} that were trained on; pass all batches"
                )

    def _begin(self) -> None:
        self._states = []

        def first() -> Iterator[Mapping[str, Any]]:
            return iter(self._data if isinstance(self._data, Iterable) else self._data(self.epoch))

        self._iterator = self._drawn(first)

    def _drawn(self, call: Callable[[], Any]) -> Any:
        """Returns the result of a function. Random numbers that the function draws come from the data's own stream, not
        from torch's global generators."""
        before = self._streams.states()
        if self._states:
            self._streams.set(self._states)
        else:
            self._streams.seed(mixed(self._seed, "data", self.epoch))
        try:
            return call()
        finally:
            self._states = self._streams.states()
            self._streams.set(before)
