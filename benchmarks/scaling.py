"""Growth of costs: with target modules, with adapters on one host, with width. Straight lines in the plots are linear
growth."""

from __future__ import annotations

import copy
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import peftcore
from benchmarks.contenders import LORA, limit_step, training_step
from benchmarks.hosts import PROJECTIONS, llama, tokens
from benchmarks.serving import forward
from benchmarks.timing import take_turns
from peftcore.targets.resolver import Target

T = TypeVar("T")
Costs = dict[str, float]
"""Milliseconds of each thing that is done."""
TARGETS = (100, 300, 1_000, 3_000, 10_000)
ADAPTERS = (1, 3, 10, 30, 100, 300, 1_000)
WIDTHS = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Growth:
    """Costs over something that grows; all in milliseconds."""

    title: str
    over: str
    sizes: tuple[int, ...]
    costs: Mapping[str, tuple[float, ...]]

    def exponents(self) -> dict[str, float]:
        """Return the steepest growth between neighbours: 1 is linear. Costs below the first are as good as constant."""
        steps = np.diff(np.log(self.sizes))
        return {name: float(max(np.diff(np.log(each)) / steps)) for name, each in self.costs.items()}


def milliseconds(call: Callable[[], object], times: int = 3) -> float:
    """Return the least of a few times: what others do to the machine only adds."""
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return 1e3 * min(found)


class Experts(nn.Module):
    """Many small layers, of which each input passes one."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run one expert."""
        output: torch.Tensor = self.experts[0](x)
        return output


def target_modules() -> Growth:
    """Measure applying, merging and unmerging, removing."""
    found = defaultdict(list)
    for count in TARGETS:
        model = Experts(count)
        for name, spent in least_of(partial(handled, model, "experts.*")).items():
            found[name].append(spent)
    return growth("LoRA on experts", "target modules", TARGETS, found)


def handled(model: nn.Module, target: Target) -> Costs:
    """Measure one more adapter that comes and goes."""
    applying, injection = once(partial(peftcore.apply, model, "lora", target=target, name="new"))
    peftcore.activate(model, "new")  # alone: those that act before it would have to be merged first
    merging = once(injection.merge)[0] + once(injection.unmerge)[0]
    removing = once(injection.remove)[0]
    return {"apply": applying, "merge and unmerge": merging, "remove": removing}


def once(call: Callable[[], T]) -> tuple[float, T]:
    """Return milliseconds of one call, and its result. Python looks for garbage as it does, but what was made before
    has been looked through."""
    gc.collect()
    begin = time.perf_counter()
    result = call()
    return 1e3 * (time.perf_counter() - begin), result


def least_of(measure: Callable[[], Costs], times: int = 3) -> Costs:
    """Return the least of a few, of each cost."""
    rounds = [measure() for _ in range(times)]
    return {name: min(each[name] for each in rounds) for name in rounds[0]}


def adapters() -> Growth:
    """Measure one adapter beside many, of which one acts: it comes, is switched to, runs, goes."""
    model, ids = llama(width=64, layers=2), tokens(1, 8)
    call, found = forward(model, ids), defaultdict(list)
    with TemporaryDirectory() as folder:
        peftcore.apply(model, "lora", target=PROJECTIONS, name="a0").save(folder)

        def of_one() -> Costs:
            costs = handled(model, PROJECTIONS)
            peftcore.activate(model, "a0")
            costs["load"], loaded = once(partial(peftcore.load, model, folder, name="new", active=False))
            costs["switch"] = once(partial(peftcore.activate, model, "new"))[0]
            costs["forward"] = milliseconds(call, 10)
            loaded.remove()
            peftcore.activate(model, "a0")
            return costs

        for count in ADAPTERS:
            for number in range(len(peftcore.injections(model)), count):
                peftcore.load(model, folder, name=f"a{number}", active=False)
            peftcore.activate(model, "a0")
            for name, spent in least_of(of_one).items():
                found[name].append(spent)
    return growth("one more adapter on a host", "adapters", ADAPTERS, found)


def widths() -> Growth:
    """Measure a training step with LoRA, and the limit."""
    found = defaultdict(list)
    for width in WIDTHS:
        base, ids = llama(width=width, layers=1), tokens(1, 64)
        steps = {"limit": limit_step(copy.deepcopy(base), ids), "step": training_step(LORA.ours_on(base), ids)}
        for name, seconds in take_turns(steps, 5).items():
            found[name].append(1e3 * float(np.median(seconds)))
    return growth("a block of Llama", "width", WIDTHS, found)


def growth(title: str, over: str, sizes: tuple[int, ...], found: Mapping[str, list[float]]) -> Growth:
    return Growth(title, over, sizes, {name: tuple(each) for name, each in found.items()})


def all_growth() -> Iterator[Growth]:
    """Yield all measurements, one after the other."""
    yield from (measure() for measure in (target_modules, adapters, widths))


def draw(found: list[Growth], path: Path) -> None:
    """Draw a chart each, both axes logarithmic."""
    figure = Figure(figsize=(4.2 * len(found), 3.6), dpi=120, layout="constrained")
    for axes, each in zip(np.atleast_1d(figure.subplots(1, len(found))), found, strict=True):
        for name, costs in each.costs.items():
            axes.loglog(each.sizes, costs, marker="o", markersize=4, label=name)
        start = min(costs[0] for costs in each.costs.values())
        ends = np.array([each.sizes[0], each.sizes[-1]])
        axes.loglog(ends, start * ends / ends[0], color="0.6", linestyle=":", label="linear")
        axes.set(title=each.title, xlabel=each.over, ylabel="milliseconds")
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
