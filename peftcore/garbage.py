"""When Python does not look for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept() -> Iterator[None]:
    """No garbage is looked for meanwhile. What is being made will stay, many objects for each site; now and then Python
    would look through those of the whole process, in vain, which takes longer than to make thousands of them."""
    looking = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looking:  # of two threads at once, the one that came first
            gc.enable()
