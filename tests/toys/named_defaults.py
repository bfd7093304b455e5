"""Defaults of methods' options, each with the line that fixes it: the tables stand in the plugins' `test_defaults.py`.

A plugin's `HELD` has the defaults that a paper, its authors' code or, where neither says one, a library fixes, with
where that is read; where the source has another value than ours, the row says it, and why ours is another. `FREE` has
the defaults that nothing fixes, with why they are what they are; `tests/running/held_defaults.py` leaves these alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

import peftcore

Held = Mapping[tuple[str, str], tuple[Any, str]]
Free = Mapping[tuple[str, str], str]

SOURCE = re.compile(
    r"[\w.-]+/[\w.-]+@[0-9a-f]{7}, \S+: .+"  # a line of a repository
    r"|arXiv \d{4}\.\d{5}, .+"
    r"|OpenReview \w+, .+"
    r"|(peft|torch|diffusers) \d+\.\d+: .+"
)
"""How a source begins."""


def rows(held: Held, free: Free) -> list[Any]:
    """Return a parameter for each row, called like ``lora.rank``: the method, the option, and what the table says."""
    assert not held.keys() & free.keys(), f"held and free: {held.keys() & free.keys()}"
    return [pytest.param(*key, row, id=".".join(key)) for key, row in {**held, **free}.items()]


def assert_as_said(method: str, option: str, row: tuple[Any, str] | str) -> None:
    """Check that the option is there, and that its default is that of the row, if the row has one."""
    fields = peftcore.method(method).Config.model_fields
    assert option in fields, f"{method} has no option {option}: take the row away"
    if isinstance(row, str):
        assert row
        return
    expected, source = row
    assert SOURCE.fullmatch(source), f"{source!r} names no line, table or library"
    found = fields[option].get_default(call_default_factory=True)
    assert (type(found), found) == (type(expected), expected), f"{method}.{option} is {found!r}, not as in {source}"
