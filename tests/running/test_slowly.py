"""Of a test's parameters those that are told are quick, all others slow, and none is lost."""

import pytest
from slowly import quick


def test_the_others_are_slow() -> None:
    found = quick([("lora", 1), ("dora", 2), "ia3"], [("dora", 2)])
    assert [each.values for each in found] == [("lora", 1), ("dora", 2), ("ia3",)]
    assert [[mark.name for mark in each.marks] for each in found] == [["slow"], [], ["slow"]]


def test_a_quick_one_that_is_none_is_refused() -> None:
    with pytest.raises(LookupError, match="vera"):
        quick(["lora"], ["vera"])
