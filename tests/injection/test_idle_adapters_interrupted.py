"""Ctrl-C, errors of torch and of files while the values of adapters leave and come back: each adapter is where it was,
or where it was to be, and it is known where."""

import pytest
from fault_scenes import CASES

from peftcore.testing.faults import inject_faults

NAMES = ["keep_within", "rest", "wake", "activate an idle one", "end a limit", "swap into an idle one"]


@pytest.mark.parametrize("name", NAMES)
def test_values_leave_and_come_as_a_whole(name: str) -> None:
    case = CASES[name]
    report = inject_faults(case.operation, case.make, name=name, every=12, often=1, seed=2, leave=case.leave)
    assert not report.found, report
    assert sum(report.tried.values()) > 5
