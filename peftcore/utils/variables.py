"""Sets context variables until the end of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Context manager in which a context variable has the passed value. The previous value is restored at the end, even
    after an interrupt."""
    before = variable.get()
    try:
        variable.set(value)
        yield
    finally:
        variable.set(before)
