"""Random histories of two to four threads that change one model at once. Where it ends, and what each operation gave,
is that of some order of the same operations, one after the other, on a fresh model."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from core_toys import stir
from torch import Tensor, nn
from turns import Turns, locks_take_turns

import peftcore
from peftcore.errors import AdapterInUse, MergeError, PeftcoreError, SwapError, UnknownInjection
from peftcore.forward.state.host_state import state_of

NAMES = ("a", "b", "c")
METHODS = ("lora", "dora", "ia3", "oft", "bitfit")
TRIES = 200
CLOSE = 1e-9
_SAVED = tempfile.TemporaryDirectory(prefix="peftcore-threads-")
"""The folder of saved adapters, which goes with the process."""


class Layers(nn.Module):
    """Three linear layers, so that a change can stop between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return found


def base() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Layers().double().eval()


@functools.cache
def inputs() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def apply(model: nn.Module, name: str, method: str, seed: int) -> peftcore.Injection:
    return peftcore.apply(model, method, name=name, target=["first", "second", "third"], dtype="float64", seed=seed)


@functools.cache
def saved(method: str, seed: int) -> Path:
    """The folder of an adapter with values of its own."""
    model = base()
    injection = apply(model, "saved", method, seed)
    stir(injection, seed=seed)
    folder = Path(_SAVED.name, f"{method}-{seed}")
    injection.save(folder)
    return folder


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(inputs())
    return found


def _of(model: nn.Module, name: str) -> peftcore.Injection:
    injection = peftcore.injections(model).get(name)
    if injection is None:
        raise UnknownInjection(name)
    return injection


def _save(model: nn.Module, name: str) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        _of(model, name).save(folder)
        other = base()
        return {key: value.clone() for key, value in peftcore.load(other, folder).state_dict().items()}


def _combine(model: nn.Module, first: str, second: str) -> None:
    peftcore.combine(model, {first: 0.5, second: 2.0}, "svd", name=f"{first}{second}", rank=2)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "apply": apply,
    "load": lambda model, name, method, seed: peftcore.load(model, saved(method, seed), name=name),
    "load idly": lambda model, name, method, seed: peftcore.load(model, saved(method, seed), name=name, active=False),
    "remove": lambda model, name: _of(model, name).remove(),
    "merge": lambda model, name: _of(model, name).merge(),
    "merge for good": lambda model, name: _of(model, name).merge(None),
    "unmerge": lambda model, name: _of(model, name).unmerge(),
    "bake": lambda model, name: _of(model, name).bake(),
    "activate": lambda model, names: peftcore.activate(model, *names),
    "train": lambda model, name, mode: _of(model, name).trainable(mode),
    "swap": lambda model, name, method, seed: _of(model, name).swap(saved(method, seed)),
    "save": _save,
    "combine": _combine,
    "quantize": lambda model: peftcore.quantize(model, "int8"),
    "dequantize": lambda model: peftcore.dequantize(model),
    "forward": output,
    "call": lambda model, names: peftcore.using(model, *names or (None,))(output, model),
}
WEIGHTS = {"forward": 3, "merge": 3, "unmerge": 2, "remove": 2, "load": 3, "quantize": 0.5, "dequantize": 0.5}


@dataclass
class Step:
    """One operation of one thread."""

    thread: int
    name: str
    arguments: tuple[Any, ...]
    result: Any = None
    begun: int = 0
    ended: int = 0
    held: tuple[int, int] | None = None
    """When it took and released the lock of the model."""

    def run(self, model: nn.Module) -> Any:
        """Returns what it gives: a value, or the class of a typed error."""
        try:
            found = OPERATIONS[self.name](model, *self.arguments)
        except PeftcoreError as error:
            return type(error)
        return found if isinstance(found, Tensor | dict) else None

    def refused(self, others: list[Step]) -> bool:
        """Whether it was refused for what another thread did meanwhile: it ran the model, called it under a choice of
        its own, or removed the adapter."""
        called = any(
            each.name == "call" and each.thread != self.thread and each.begun < self.ended and self.begun < each.ended
            for each in others
        )
        by_call = called and (self.name, self.result) in (
            ("swap", SwapError), ("merge", MergeError), ("merge for good", MergeError), ("bake", MergeError)
        )  # fmt: skip
        packed = self.name in ("forward", "call") and any(
            each.name in ("quantize", "dequantize") and each.begun < self.ended and self.begun < each.ended
            for each in others
        )  # forwards are to run before or after: see docs/promises.md
        return self.result in (AdapterInUse, UnknownInjection) or by_call or packed

    def __repr__(self) -> str:
        given = self.result.__name__ if isinstance(self.result, type) else type(self.result).__name__
        return f"{self.thread}: {self.name}{self.arguments} -> {given} [{self.begun}, {self.ended}] {self.held or ''}"


def drawn(random: Random, thread: int, there: set[str]) -> Step:
    """One random operation, mostly on adapters that are there, or will be."""
    name = random.choices([*OPERATIONS], [WEIGHTS.get(each, 1) for each in OPERATIONS])[0]
    new = [each for each in NAMES if each not in there]
    known = sorted(there) if there and random.random() < 0.9 else NAMES
    one = random.choice(new if new and name in ("apply", "load", "load idly") and random.random() < 0.7 else known)
    some = tuple(each for each in known if random.random() < 0.6)
    there.add(one)
    if name in ("apply", "load", "load idly", "swap"):
        return Step(thread, name, (one, random.choice(METHODS), random.randint(1, 3)))
    if name in ("activate", "call"):
        return Step(thread, name, (some,))
    if name == "train":
        return Step(thread, name, (one, random.random() < 0.5))
    if name == "combine":
        return Step(thread, name, (one, random.choice([each for each in NAMES if each != one])))
    return Step(thread, name, () if name in ("forward", "quantize", "dequantize") else (one,))


class Threads:
    """Threads that stay, since what they choose stays with them; the first one adapts the model."""

    def __init__(self, number: int) -> None:
        self.pools = [ThreadPoolExecutor(1) for _ in range(number)]

    def do(self, thread: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns what a function gives in one of the threads."""
        return self.pools[thread].submit(function, *arguments).result()

    def close(self) -> None:
        for pool in self.pools:
            pool.shutdown()


def end(model: nn.Module, threads: Threads) -> dict[str, Any]:
    """What a model is in the end."""

    def here() -> Any:
        try:
            return output(model)
        except PeftcoreError as error:
            return type(error)

    outputs = [[threads.do(thread, here) for thread in range(len(threads.pools))] for _ in range(2)]
    injections = peftcore.injections(model)
    state = state_of(model)
    return {
        "names": tuple(injections),
        "methods": tuple(each.method.name for each in injections.values()),
        "merged": () if state is None else state.merged,
        "classes": {path: type(module).__name__ for path, module in model.named_modules()},
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "trains": {name: each.requires_grad for name, each in model.named_parameters()},
        "values": dict(model.state_dict()),
        "outputs": outputs,
    }


def differs(one: Any, other: Any, path: str = "") -> str:
    """Where two results differ; empty where they do not."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        return "" if same and torch.allclose(one.double(), other.double(), CLOSE, CLOSE) else path
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{path} {sorted(one.keys() ^ other.keys())}"
        return next((found for key in one if (found := differs(one[key], other[key], f"{path}.{key}"))), "")
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return next((found for key, (a, b) in pairs if (found := differs(a, b, f"{path}.{key}"))), "")
    return "" if type(one) is type(other) and not isinstance(one, Tensor) and one == other else f"{path}: {one} {other}"


@dataclass
class History:
    """A history: threads, the operations before, and those of each thread."""

    seed: int
    excludes: bool = True
    before: list[Step] = field(default_factory=list)
    steps: list[list[Step]] = field(default_factory=list)

    def __post_init__(self) -> None:
        random = Random(self.seed)
        number = random.randint(2, 4)
        self.most = random.choice([3, 15, 60, 250])
        for name in random.sample(NAMES, random.choice([0, 1, 2, 2, 3])):
            self.before.append(Step(0, "load", (name, random.choice(METHODS), random.randint(1, 3))))
        if self.before and random.random() < 0.4:
            self.before.append(Step(0, "merge", self.before[0].arguments[:1]))
        there = {step.arguments[0] for step in self.before}
        for thread in range(number):
            self.steps.append([drawn(random, thread, there) for _ in range(random.randint(1, 3))])

    def begin(self, threads: Threads) -> nn.Module:
        model = base()
        for step in self.before:
            threads.do(0, step.run, model)
        return model

    def at_once(self) -> dict[str, Any]:
        """Run the threads at once; returns the end."""
        for step in (each for steps in self.steps for each in steps if each.name in ("load", "load idly", "swap")):
            saved(*step.arguments[1:])  # before, as nothing is to be made by several threads
        turns = Turns(self.seed, self.most, self.excludes)
        threads = Threads(len(self.steps))
        try:
            with locks_take_turns(turns):
                model = self.begin(threads)
                turns.begin(len(self.steps))

                def work(steps: list[Step]) -> None:
                    for step in steps:
                        step.begun = next(turns.clock)
                        step.result = step.run(model)
                        step.ended = next(turns.clock)

                running = [
                    pool.submit(turns.run, number, functools.partial(work, steps))
                    for number, (pool, steps) in enumerate(zip(threads.pools, self.steps, strict=True))
                ]
                for each in running:
                    each.result()
                for thread, taken, released in turns.held:
                    for step in self.steps[thread]:
                        if step.begun < taken < step.ended:
                            step.held = taken, released
                return end(model, threads)
        finally:
            threads.close()

    def orders(self) -> list[list[Step]]:
        """Orders that may be it. An operation stands somewhere between its begin and its end; while it holds the lock
        of the model, if it takes it."""
        random = Random(self.seed)
        every = [step for steps in self.steps for step in steps]
        found: dict[tuple[int, ...], list[Step]] = {}
        for number in range(TRIES):
            places = {}
            for step in every:
                begun, ended = step.held if step.held and self.excludes else (step.begun, step.ended)
                places[id(step)] = (ended, begun)[number] if number < 2 else random.uniform(begun, ended)
            order = sorted(every, key=lambda step: places[id(step)])
            found.setdefault(tuple(map(id, order)), order)
        return [*found.values()]

    def one_after_the_other(self, order: list[Step], expected: dict[str, Any]) -> str:
        """Where an order of the operations gives something else; empty where it does not."""
        threads = Threads(len(self.steps))
        try:
            model = self.begin(threads)
            for step in order:
                if not step.refused(order) and (
                    why := differs(step.result, threads.do(step.thread, step.run, model), "result")
                ):
                    return f"{step}: {why}"
            return differs(expected, end(model, threads))
        finally:
            threads.close()

    def check(self) -> None:
        """Raise AssertionError where it is that of no order."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = self.at_once()
            why = []
            for order in self.orders():
                if not (told := self.one_after_the_other(order, expected)):
                    return
                why.append(told)
        lines = "\n".join(map(str, [*self.before, "at once:", *(step for steps in self.steps for step in steps)]))
        raise AssertionError(f"History({self.seed}) is that of no order:\n{lines}\n" + "\n".join(dict.fromkeys(why)))
