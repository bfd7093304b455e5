"""Identifies threads by objects, because the system reuses the numbers of ended threads."""

from __future__ import annotations

import threading


class Token:
    """An object that identifies a thread. It is unique while the thread runs or a reference to the object exists."""


class _This(threading.local):
    def __init__(self) -> None:
        self.token = Token()


_THIS = _This()


def this_thread() -> Token:
    """Returns the object that identifies the current thread."""
    return _THIS.token
