"""Progress bars for long work: shown if tqdm is installed and the output is a terminal."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

DELAY = 2.0
"""Seconds of work before the progress bar for building operators appears; most adapters are built faster."""


def through(data: Iterable[Any], title: str) -> Iterable[Any]:
    """Returns an iterable over the data that shows a progress bar."""
    tqdm = _tqdm()
    if tqdm is None:
        return data
    bar: Iterable[Any] = tqdm(data, desc=title, leave=False, disable=None)  # None: silent unless on a terminal
    return bar


class Progress:
    """A progress bar over steps that the caller counts. It appears only if the steps take more than `DELAY` seconds."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Any = None

    def expect(self, more: int) -> None:
        """Add `more` steps to the total."""
        tqdm = _tqdm()
        if tqdm is not None and more > 1:
            if self._bar is None:
                self._bar = tqdm(total=0, desc=self._title, leave=False, disable=None, delay=DELAY)
            self._bar.total += more

    def step(self) -> None:
        """Count one step."""
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        """Remove the bar from the terminal and from this object, so that the object can be copied and pickled."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _tqdm() -> Any:
    try:
        return importlib.import_module("tqdm.auto").tqdm
    except ImportError:
        return None
