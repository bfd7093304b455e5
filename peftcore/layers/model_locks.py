"""Locks of models: while one thread changes a model, other threads that change the same modules wait.

    with changing(model):
        ...

Each module has one lock as long as it exists. A change of a model takes the locks of all its modules. So changes of
models that share modules, such as a model and a part of it, run one after the other. Changes of other models do not
wait. Forwards take no lock. The locks are stored outside of the modules, so copies and pickles of a model do not
contain them.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from types import TracebackType
from typing import Protocol

from torch import nn

from peftcore.layers.adapter_modules import base_modules


class Lock(Protocol):
    """A lock that one thread can take several times, for operations that call each other."""

    def __enter__(self) -> object:
        """Take the lock; wait while another thread holds it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Release the lock."""


_LOCKS: weakref.WeakKeyDictionary[nn.Module, tuple[int, Lock]] = weakref.WeakKeyDictionary()
"""The locks of all modules that were ever changed, each with a number. Several locks are taken in the order of their
numbers."""
_NUMBERS = itertools.count()
_GUARD = threading.RLock()
"""The lock for reading and writing `_LOCKS`. It is reentrant, because a garbage collection may take it again in
between."""


def changing(*models: nn.Module) -> Lock:
    """Returns a context manager in which only this thread may change the models. It can be entered again inside of
    itself. Usually it is a lock of Python itself, which is released after every error and interrupt. If parts of the
    models were changed separately before, it takes several locks.
    """
    modules = base_modules(*models)
    with _GUARD:
        found = dict(held for module in modules if (held := _LOCKS.get(module)) is not None)
        first = min(found.items()) if found else (next(_NUMBERS), threading.RLock())
        for module in modules:
            _LOCKS.setdefault(module, first)
    if len(found) > 1:
        return _Several([lock for _, lock in sorted(found.items())])
    return first[1]


class _Several:
    """Several locks, which all threads take in the same order."""

    def __init__(self, locks: list[Lock]) -> None:
        self._locks = locks

    def __enter__(self) -> None:
        taken: list[Lock] = []
        try:
            for lock in self._locks:
                lock.__enter__()
                taken.append(lock)
        except BaseException:
            for lock in reversed(taken):
                lock.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        for lock in reversed(self._locks):
            lock.__exit__(kind, error, trace)
