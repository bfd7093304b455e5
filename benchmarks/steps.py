"""Benchmarks of training steps: time beyond the limit, and peak memory."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.contenders import PAIRS, Step, limit_step, training_step
from benchmarks.hosts import PROJECTIONS, llama, tokens
from benchmarks.memory import peak
from benchmarks.rows import Row
from benchmarks.timing import Estimate, Times, overhead, take_turns

WANTED = {
    "lora": 0.8,
    "lora, dropout 0.1": 0.8,
    "dora": 0.6,
    "dora, low memory": math.inf,
    "boft": 0.6,
    "boft, low memory": 0.6,
    "hra": 0.6,
}
"""Time beyond the limit, ours over peft's; of others 1. A method that runs with `low_memory` gives time for memory."""

LAYOUTS = 3
"""How often all contenders are built anew: where their tensors come to lie in memory is worth up to a tenth of a step,
to one or to the other."""
WIDTH = 0.1
"""How wide the interval of a ratio may be, before it is measured for longer: up to three times, and up to six times
while what is wanted lies in it."""
Goal = tuple[Callable[[Times], Estimate], float]
"""A ratio, and what is wanted of it."""


LENGTH = 128
"""Tokens of each of the four rows of a batch."""


def contenders(
    name: str,
    autocast: bool = False,
    length: int = LENGTH,
    host: Callable[[], Any] = llama,
    target: list[str] = PROJECTIONS,
) -> Mapping[str, Step]:
    """Return the limit, ours and theirs on copies of one host."""
    base, ids = host(), tokens(4, length)
    pair = PAIRS[name]
    return {
        "limit": limit_step(copy.deepcopy(base), ids, autocast),
        "ours": training_step(pair.ours_on(copy.deepcopy(base), target), ids, autocast),
        "theirs": training_step(pair.theirs_on(copy.deepcopy(base), target), ids, autocast),
    }


def step_rows(rounds: int, methods: Iterable[str] = PAIRS) -> Iterator[list[Row]]:
    """Measure time and memory of a step with each method."""
    for name in methods:
        yield [timed(name, rounds), weighed(name)]


def variant_rows(rounds: int) -> Iterator[list[Row]]:
    """Measure the time of steps otherwise: under autocast, and of longer rows."""
    yield [timed("lora", rounds, autocast=True)]
    yield [timed("oft, exact", rounds, length=4 * LENGTH)]


def timed(name: str, rounds: int, autocast: bool = False, length: int = LENGTH) -> Row:
    what = name + ", bf16 autocast" * autocast + f", rows of {length} tokens" * (length != LENGTH)
    wanted = WANTED.get(name, 1.0)
    times = in_layouts(lambda: contenders(name, autocast, length), rounds, (ratio_of, wanted))
    return beyond(f"step, {what}: time beyond the limit", times, wanted)


def in_layouts(build: Callable[[], Mapping[str, Step]], rounds: int, *goals: Goal) -> Times:
    """Time contenders that are built anew a few times, and more often while a ratio is not narrow enough, or nearly
    what is wanted."""
    built: deque[Mapping[str, Step]] = deque(maxlen=LAYOUTS)  # the last ones stay, so that none is built in their place
    times: Times = {}
    layouts = 0
    while not times or layouts < LAYOUTS * max(_effort(ratio(times), wanted) for ratio, wanted in goals):
        built.append(build())
        layouts += 1
        more = take_turns(built[-1], math.ceil(rounds / LAYOUTS))
        times = {who: np.concatenate([times[who], more[who]]) for who in more} if times else more
    return times


def _effort(ratio: Estimate, wanted: float) -> int:
    if ratio.low <= wanted < ratio.high:
        return 6
    return 3 if ratio.width > WIDTH else 1


def beyond(figure: str, times: Times, wanted: float) -> Row:
    """Return a row of the time that ours adds to the limit, over that of theirs."""
    return Row(figure, over(times, "ours"), over(times, "theirs"), ratio_of(times), wanted)


def ratio_of(times: Times) -> Estimate:
    """Return the time that ours adds to the limit, over that of theirs."""
    return overhead(times, "ours", "theirs", "limit")


def over(times: Times, name: str) -> str:
    """Return a step as a multiple of the limit."""
    return f"{np.median(times[name]) / np.median(times['limit']):.2f} × limit"


def weighed(name: str, host: Callable[[], Any] = llama, where: str = "", target: list[str] = PROJECTIONS) -> Row:
    """Measure peak memory of a step."""
    return heavier(f"step{where}, {name}", peaks(contenders(name, host=host, target=target)))


def peaks(contenders: Mapping[str, Step]) -> Mapping[str, int]:
    """Return peak memory of each, in bytes."""
    found = {}
    for who, step in contenders.items():
        step()  # what is made once is there
        found[who] = min(peak(step) for _ in range(3))  # what records it may make something of its own the first time
    return found


def heavier(figure: str, peaks: Mapping[str, int]) -> Row:
    """Return a row of peak memory of ours over that of theirs, in bytes."""
    ratio = peaks["ours"] / peaks["theirs"]
    sizes = {who: f"{size / 1e6:.1f} MB" for who, size in peaks.items()}
    figure += ": peak memory" + (f" (limit {sizes['limit']})" if "limit" in sizes else "")
    return Row(figure, sizes["ours"], sizes["theirs"], Estimate(ratio, ratio, ratio), 1.0)
