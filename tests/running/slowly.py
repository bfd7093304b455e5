"""Parameters of a test of which a quick run has some, and `make test-slow` the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(values: Iterable[Any], some: Collection[Any]) -> list[Any]:
    """All values as parameters, tuples as several arguments; those that are not in `some` are marked as slow.

    Raises:
        LookupError: one of `some` is none of the values.
    """
    values = list(values)
    if stray := [each for each in some if each not in values]:
        raise LookupError(f"no parameters of the test: {stray}")
    return [
        pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=() if each in some else pytest.mark.slow)
        for each in values
    ]
