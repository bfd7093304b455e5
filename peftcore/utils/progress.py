"""Progress bars for long work: where tqdm is installed and somebody watches a terminal, and nothing otherwise."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

DELAY = 2.0
"""Seconds of work before a bar of building appears: most operators are built at once."""


def through(data: Iterable[Any], title: str) -> Iterable[Any]:
    """The data, behind a bar."""
    tqdm = _tqdm()
    if tqdm is None:
        return data
    bar: Iterable[Any] = tqdm(data, desc=title, leave=False, disable=None)  # None: silent unless on a terminal
    return bar


class Progress:
    """A bar over a number of steps that somebody else takes; it appears when they take long."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Any = None

    def expect(self, more: int) -> None:
        """So many further steps are to come."""
        tqdm = _tqdm()
        if tqdm is not None and more > 1:
            if self._bar is None:
                self._bar = tqdm(total=0, desc=self._title, leave=False, disable=None, delay=DELAY)
            self._bar.total += more

    def step(self) -> None:
        """One is done."""
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        """Take the bar away; copies and pickles of who holds this take none along."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _tqdm() -> Any:
    try:
        return importlib.import_module("tqdm.auto").tqdm
    except ImportError:
        return None
