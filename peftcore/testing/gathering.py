"""A pytest plugin for the declarations of reference code in tests (`against`): ``pytest -p
peftcore.testing.gathering``. It checks that the file `evidence.json` of each peftcore plugin equals the declarations of
its tests. With ``--evidence`` it writes these files from the tests that passed.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from peftcore.registry.catalogue import method as find_method
from peftcore.registry.evidence import FILE, EvidenceRow, Source, folder, read, written
from peftcore.testing.declared_evidence import declarations

KEY = "evidence"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--evidence", action="store_true", help="write into plugins' packages with what tests compare")
    parser.addini(
        "evidence", "packages whose evidence.json has to be what the tests of `testpaths` declare", type="args"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add a marker to the tests with declarations, so that ``-m against`` runs only these. If all tests are collected,
    and the file of a package differs from the declarations of its tests, an error is raised."""
    config.addinivalue_line("markers", "against: declares with whose numbers it compares")
    for item in items:
        if _of(item):
            item.add_marker("against")
    asked = {Path(config.invocation_params.dir, each).resolve() for each in config.args}
    paths = {config.rootpath / each for each in config.getini("testpaths")}
    packages = [each for pattern in config.getini("evidence") for each in config.rootpath.glob(pattern)]
    whole = asked >= paths and not config.getoption("--evidence")
    if whole and packages and (wrong := differences(items, packages)):
        raise pytest.UsageError("\n".join([*wrong, "`make evidence` writes what tests compare"]))


def declared(items: list[pytest.Item]) -> dict[Path, dict[str, set[EvidenceRow]]]:
    """Returns the comparisons that tests have declared, by evidence file of the plugin and by method."""
    found: defaultdict[Path, defaultdict[str, set[EvidenceRow]]] = defaultdict(lambda: defaultdict(set))
    for item in items:
        for name, row in _of(item):
            place = folder(find_method(name).__module__.partition(".")[0])
            if place is not None:
                found[place / FILE][name].add(row)
    return {file: dict(methods) for file, methods in found.items()}


def _of(item: pytest.Item) -> list[tuple[str, EvidenceRow]]:
    function, arguments = getattr(item, "function", None), getattr(getattr(item, "callspec", None), "params", {})
    return [(name, each.row) for each in declarations(function) for name in each.named(arguments)]


def differences(items: list[pytest.Item], packages: list[Path]) -> list[str]:
    """Returns a line of text for each comparison that is in a file but not declared by a test, or the reverse."""
    told, lines = declared(items), []
    for file in sorted({*told, *(package / FILE for package in packages)}):
        says, proves = read(file), told.get(file, {})
        for name in sorted({*says, *proves}):
            here, there = set(says.get(name, ())), proves.get(name, set())
            lines += [f"{file}: {name}: {each} is compared with in no test" for each in sorted(here - there)]
            lines += [f"{file}: {name}: {each} is not in the file" for each in sorted(there - here)]
    return lines


class Gathering:
    """Collects the declarations of tests that passed, and writes them into the evidence files."""

    def __init__(self) -> None:
        self.proved: defaultdict[Path, defaultdict[str, set[EvidenceRow]]] = defaultdict(lambda: defaultdict(set))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if report.when == "call" and report.passed:
            for file, methods in declared([item]).items():
                for name, rows in methods.items():
                    told = [[str(file), name, each.part, *vars(each.source).values()] for each in rows]
                    report.user_properties.append((KEY, told))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for key, told in report.user_properties:
            if key == KEY and isinstance(told, list):
                for file, name, part, *source in told:
                    self.proved[Path(file)][name].add(EvidenceRow(Source(*source), part))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):
            for file, methods in self.proved.items():
                file.write_text(written(methods), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--evidence"):
        config.pluginmanager.register(Gathering())
