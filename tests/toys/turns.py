"""Threads of which one runs at a time: the turn goes to another one at lines of peftcore that a seed draws, so what
threads do in between of each other can be repeated."""

from __future__ import annotations

import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType, SimpleNamespace
from typing import Any

import peftcore
from peftcore.forward.choice import scopes
from peftcore.forward.state import host_state
from peftcore.forward.state.host_state import HostState
from peftcore.layers import model_locks

HERE = str(Path(peftcore.__file__).parent)


class Stuck(BaseException):
    """No thread can go on."""


class Turns:
    """Gives turns to threads.

    Attributes:
        held: the threads that held the lock of a model, in this order, with the places in `clock` where they took and
            released it.
        excludes: whether locks of models keep other threads out; False shows what happens without them.
    """

    def __init__(self, seed: int, most: int = 40, excludes: bool = True) -> None:
        self.random, self.most, self.excludes = Random(seed), most, excludes
        self.clock = itertools.count()
        self.held: list[tuple[int, int, int]] = []
        self.gates: dict[int, threading.Semaphore] = {}
        self.numbers: dict[int, int] = {}
        self.waits: dict[int, TurnLock] = {}
        self.left, self.stuck = 0, False

    def me(self) -> int | None:
        """The number of this thread; None where it takes no turns."""
        return self.numbers.get(threading.get_ident())

    def begin(self, threads: int) -> None:
        """Announce threads, before they call `run`; the first turn is drawn."""
        self.gates = {number: threading.Semaphore(0) for number in range(threads)}
        self._next()

    def run(self, number: int, function: Callable[[], None]) -> None:
        """Run a function in this thread, at its turns."""
        self.gates[number].acquire()
        self.numbers[threading.get_ident()] = number
        sys.settrace(self._called)
        try:
            function()
        finally:
            sys.settrace(None)
            del self.numbers[threading.get_ident()], self.gates[number]
            if self.gates:
                self._next()

    def _next(self) -> None:
        self.left = self.random.randint(1, self.most)
        able = [number for number in self.gates if number not in self.waits]
        if not able:  # each is told
            self.stuck = True
            able = [*self.gates]
            self.waits.clear()
        self.gates[self.random.choice(able)].release()

    def hand_over(self) -> None:
        """Let another thread go on, or this one."""
        number = self.me()
        assert number is not None
        gate = self.gates[number]
        self._next()
        gate.acquire()
        if self.stuck:
            raise Stuck

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(HERE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and self.me() is not None:
            self.left -= 1
            if self.left <= 0 and not _within_a_lock(frame):
                self.hand_over()
        return self._line


def _within_a_lock(frame: FrameType | None) -> bool:
    """Whether this thread holds a lock of Python: it imports, or computes a cached property."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or (
            code.co_name == "__get__" and code.co_filename == functools.__file__
        ):
            return True
        frame = frame.f_back
    return False


class TurnLock:
    """A lock that one thread takes several times; who waits for it has no turn. Where no turns are taken it is none."""

    def __init__(self, turns: Turns, of_model: bool = False) -> None:
        self.turns, self.of_model = turns, of_model
        self.owner: int | None = None
        self.count, self.taken = 0, 0

    def __enter__(self) -> bool:
        number = self.turns.me()
        if number is None:
            return True
        while self.owner not in (None, number) and (self.turns.excludes or not self.of_model):
            self.turns.waits[number] = self
            self.turns.hand_over()
        if self.owner != number:
            self.taken = next(self.turns.clock)
        self.owner, self.count = number, self.count + 1 if self.owner == number else 1
        return True

    def __exit__(self, *_: object) -> None:
        number = self.turns.me()
        if number is not None and self.owner == number:
            self.count -= 1
            if not self.count:
                self.owner = None
                if self.of_model:
                    self.turns.held.append((number, self.taken, next(self.turns.clock)))
                for waiting in [each for each, lock in self.turns.waits.items() if lock is self]:
                    del self.turns.waits[waiting]


@contextmanager
def locks_take_turns(turns: Turns) -> Iterator[None]:
    """Within, the locks of peftcore are those of `turns`; models have to be made within."""
    begun = HostState.__post_init__

    def begin(state: HostState) -> None:
        begun(state)
        state.swap_lock = TurnLock(turns)  # type: ignore[assignment]

    changes: list[tuple[Any, str, Any]] = [
        (HostState, "__post_init__", begin),
        (host_state, "threading", SimpleNamespace(RLock=lambda: TurnLock(turns))),
        (model_locks, "threading", SimpleNamespace(RLock=lambda: TurnLock(turns, of_model=True))),
        (model_locks, "_GUARD", TurnLock(turns)),
        (scopes, "_LOCK", TurnLock(turns)),
    ]
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in changes]
    try:
        for holder, name, value in changes:
            setattr(holder, name, value)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)
