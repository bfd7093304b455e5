"""``pytest --cost``: where processor time goes, by method, by check of the kit, by file and by test.

Time of processes that a test starts and waits for counts as its own; a fixture that several share counts for the first.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest
from covering import declared

KEY = "processor time"
LONGEST = 40


def _spent() -> float:
    """Seconds of this process and of those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Costs:
    """What the tests of a run cost: taken where they run, gathered where the report is written."""

    def __init__(self) -> None:
        self.by: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.before = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self.before = _spent()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        if call.when == "teardown":
            pair = declared(item)
            method, check = ("", "") if pair is None else (pair[0].method.name, pair[1].name)
            item.user_properties.append((KEY, [_spent() - self.before, method, check]))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = dict(report.user_properties).get(KEY)
        if report.when == "teardown" and isinstance(told, list):
            seconds, method, check = told
            self.by["test"][report.nodeid] += seconds
            self.by["file"][report.nodeid.partition("::")[0]] += seconds
            if method:
                self.by["method"][method] += seconds
                self.by["check"][check] += seconds

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for what in ("method", "check", "file", "test"):
            counted = self.by[what]
            terminalreporter.section(f"processor time by {what}: {counted.total():.1f} s of {len(counted)}")
            for name, seconds in counted.most_common(LONGEST if what == "test" else None):
                terminalreporter.write_line(f"{seconds:8.2f} s  {name}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cost", action="store_true", help="say where processor time goes, by method, check, file, test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--cost"):
        config.pluginmanager.register(Costs())
