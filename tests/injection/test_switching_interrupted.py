"""Ctrl-C and errors of torch while a choice is made, in a block or without: it is in force, or the one before is."""

import pytest
from fault_scenes import CASES

from peftcore.testing.faults import inject_faults

NAMES = [
    "activate", "activate in a block", "activate a composition", "a composition in a block", "route",
    "route in a block", "using", "enabled in a block", "disabled in a block",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_is_made_or_not(name: str) -> None:
    case = CASES[name]
    report = inject_faults(case.operation, case.make, name=name, every=16, often=1, seed=1)
    assert not report.found, report
    assert sum(report.tried.values()) > 5
