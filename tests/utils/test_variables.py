"""A context variable has its value until the end of a block, whatever ends it."""

import sys
from contextvars import ContextVar
from types import FrameType
from typing import Any

import pytest

from peftcore.utils import variables
from peftcore.utils.variables import holding

VALUE: ContextVar[int] = ContextVar("value", default=1)


def test_it_holds_until_the_end_of_the_block() -> None:
    with holding(VALUE, 2):
        with holding(VALUE, 3):
            assert VALUE.get() == 3
        assert VALUE.get() == 2
        with pytest.raises(KeyError), holding(VALUE, 4):
            raise KeyError
    assert VALUE.get() == 1


def test_an_interrupt_while_it_begins_leaves_nothing() -> None:
    lines = 0

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename == variables.__file__ else None

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left, lines
        left -= event == "line"
        if not left:
            sys.settrace(None)
            lines += 1
            raise KeyboardInterrupt
        return line

    for stop in range(1, 5):  # up to the `yield`
        left, before = stop, sys.gettrace()
        sys.settrace(enter)
        try:
            holding(VALUE, 2).__enter__()
        except KeyboardInterrupt:
            assert VALUE.get() == 1, stop
        finally:
            sys.settrace(before)
    assert lines == 4
