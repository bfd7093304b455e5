"""Times contenders that take turns, and ratios of what they add to a limit, each with an interval."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Times = Mapping[str, NDArray[np.float64]]
"""Seconds by contender, one for each round."""
DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A median, and the interval in which it lies with 95 % probability (bootstrap over rounds)."""

    value: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Return the length of the interval."""
        return self.high - self.low

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect garbage before the block, not within."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def take_turns(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> Times:
    """Run all contenders in each round, each time in another order, so that none has the quiet moments alone.

    Args:
        contenders: what is timed, by name.
        rounds: how often each runs.
        warmup: rounds before that, which do not count.
    """
    names = list(contenders)
    draw = np.random.default_rng(0)
    found: dict[str, list[float]] = {name: [] for name in names}
    with uncollected():
        for number in range(warmup + rounds):
            for name in draw.permutation(names):
                begin = time.perf_counter()
                contenders[name]()
                spent = time.perf_counter() - begin
                if number >= warmup:
                    found[name].append(spent)
    return {name: np.array(seconds) for name, seconds in found.items()}


def estimate(times: Times, of: Callable[[Mapping[str, float]], float]) -> Estimate:
    """Return a number made of the medians of all contenders, with its interval: rounds are drawn again, the same for
    all."""
    count = len(next(iter(times.values())))
    draws = np.random.default_rng(0).integers(0, count, (DRAWS, count))
    medians = {name: np.median(seconds[draws], axis=1) for name, seconds in times.items()}
    drawn = [of({name: float(each[i]) for name, each in medians.items()}) for i in range(DRAWS)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(of({name: float(np.median(seconds)) for name, seconds in times.items()}), float(low), float(high))


def ratio(times: Times, one: str, other: str) -> Estimate:
    """Return the time of one over the time of another."""
    return estimate(times, lambda median: median[one] / median[other])


def overhead(times: Times, one: str, other: str, limit: str) -> Estimate:
    """Return what one adds to the limit of its round, over what another adds: what is slower for a while is so for
    all."""
    return ratio({name: times[name] - times[limit] for name in (one, other)}, one, other)
