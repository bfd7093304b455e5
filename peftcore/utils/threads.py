"""Threads by objects of their own: the system gives the numbers of threads that ended to new ones."""

from __future__ import annotations

import threading


class Token:
    """Stands for a thread, as long as it runs or somebody remembers it."""


class _This(threading.local):
    def __init__(self) -> None:
        self.token = Token()


_THIS = _This()


def this_thread() -> Token:
    """Returns the token of the thread that asks."""
    return _THIS.token
