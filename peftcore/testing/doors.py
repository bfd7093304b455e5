"""The two functions that run the checks: `conformance` makes tests for pytest, and `check_method` runs without
pytest."""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peftcore.contract.method import Method, Tags
from peftcore.errors import ConfigError
from peftcore.registry.catalogue import method as find_method
from peftcore.registry.preset_methods import as_arguments
from peftcore.testing.failures import CheckFailed
from peftcore.testing.hosts import ALL_HOSTS, HOSTS
from peftcore.testing.kit import ALL, ANYWHERE, Case, Check, Context, NotApplicable, cases

TELLING = ("llama", "encoder")
"""The default hosts of a quick run. One has separate projections that are called as modules. The other has a fused
projection, whose weight is used by its parent module."""
CHANGED = "PEFTCORE_TEST_CHANGED"
"""Environment variable: names of methods, separated by spaces. These are checked on all hosts even in a quick run."""

Options = Mapping[str, Mapping[str, Any]]
Status = Literal["passed", "failed", "expected", "skipped"]


@dataclass(frozen=True)
class Result:
    """The outcome of one check on one host."""

    check: str
    """The check's name."""
    host: str
    """The host's name."""
    status: Status
    """"expected" means that the check failed, and that this failure was declared in advance."""
    message: str = ""
    """The message of the failure, or the reason why the check was skipped."""

    def __str__(self) -> str:
        return f"{self.status:8} {self.check}-{self.host}" + (f": {self.message}" if self.message else "")


def _method(method: str | type[Method], options: Options | None) -> tuple[type[Method], Options, Tags]:
    """Return the class of a method, its options by host, and its tags. For a preset, the options and tags include those
    of the preset."""
    named = find_method(method) if isinstance(method, str) else method
    found, own = as_arguments(named)
    given = options or {}
    return found, {**given, "*": {**own, **given.get("*", {})}} if own else given, named.tags


def _hosts(hosts: Iterable[str] | None) -> list[str]:
    names = list(HOSTS if hosts is None else hosts)
    unknown = [name for name in names if name not in ALL_HOSTS]
    if unknown:
        raise ConfigError(f"no host named {', '.join(unknown)}; there are: {', '.join(ALL_HOSTS)}")
    return names


def _named(
    method: type[Method],
    hosts: Iterable[str],
    options: Options,
    expected: Mapping[str, str],
    context: Context | None,
    tags: Tags,
) -> dict[str, tuple[Check, Case]]:
    """Return the checks that apply to a method, each with its case, by id.

    Raises:
        ConfigError: `expected` contains a check that does not run.
    """
    chosen = {name: ALL_HOSTS[name] for name in hosts}
    named = {
        f"{check.name}-{case.host.name}": (check, case) for check, case in cases(method, chosen, options, context, tags)
    }
    stray = [name for name in expected if name not in named and name.rpartition("-")[2] in chosen]
    if stray:
        raise ConfigError(f"{method.name}: failures are expected of checks that do not run: {', '.join(stray)}")
    return named


def _telling(check: Check, telling: Iterable[str]) -> tuple[str, ...]:
    """Return the hosts of a check in a quick run: those in `telling`. If the check runs only on some hosts, it is one
    of these."""
    if check.chooses:
        return (ANYWHERE.name,)
    if check.hosts is None:
        return tuple(telling)
    return (*(name for name in telling if name in check.hosts), *check.hosts)[:1]


def _run(check: Check, case: Case) -> str | None:
    try:
        reason = None if check.chooses else case.inapplicable
    except Exception:  # the check meets it again, and says what it means
        reason = None
    if reason is not None:
        raise NotApplicable(reason)
    return check(case)


def check_method(
    method: str | type[Method],
    *,
    hosts: Iterable[str] | None = None,
    options: Options | None = None,
    expected_failures: Mapping[str, str] | None = None,
    context: Context | None = None,
) -> list[Result]:
    """Run all checks that apply to a method, according to its tags, and return their results.

    Args:
        method: the name of a method, or its class, which need not be registered. With the name of a preset, the
            preset's method is checked with the preset's options.
        hosts: names of hosts in `HOSTS` or `APART`; by default all hosts in `HOSTS`.
        options: options of the method, by name of the host. They may include "target", to replace the default target.
            Options under "*" apply to every host.
        expected_failures: checks that are known to fail, as "<check>-<host>", each with the reason. If such a check
            passes, that counts as a failure.
        context: a function that returns the arguments of ``peftcore.call`` that the method needs. It gets the host and
            a picture [rows or 1, 1, 16, 16].

    Raises:
        ConfigError: a host does not exist, or `expected_failures` contains a check that does not run.
    """
    expected = expected_failures or {}
    results = []
    found, told, tags = _method(method, options)
    for name, (check, case) in _named(found, _hosts(hosts), told, expected, context, tags).items():
        run = functools.partial(_run, check, case)
        results.append(judged(check, case.host.name, run, expected.get(name)))
    return results


def judged(check: Check, where: str, run: Callable[[], str | None], reason: str | None) -> Result:
    """Run a check by `run` and return the result. `reason` is the reason why it is expected to fail, or None."""

    def result(status: Status, message: str = "") -> Result:
        return Result(check.name, where, status, message)

    try:
        measured = run()
    except NotApplicable as skip:
        return result("skipped", str(skip))
    except CheckFailed as failure:
        return result("failed", str(failure)) if reason is None else result("expected", reason)
    except Exception:  # what is under test may raise anything, and the other checks still count
        return result("failed", traceback.format_exc()) if reason is None else result("expected", reason)
    if reason is None:
        return result("passed", measured or "")
    return result("failed", f"passes, but was expected to fail: {reason}")


def parametrized(
    runs: Mapping[str, Callable[[], object]], expected: Mapping[str, str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that turns a function with an argument `check` into one pytest test for each entry of `runs`. Tests
    that are in `expected` must fail."""
    import pytest

    def thunk(run: Callable[[], object]) -> Callable[[], None]:
        def check() -> None:
            try:
                run()
            except NotApplicable as skip:
                pytest.skip(str(skip))

        return check

    parameters = [
        pytest.param(
            thunk(run),
            id=name,
            marks=[pytest.mark.xfail(reason=expected[name], strict=True)] if name in expected else [],
        )
        for name, run in runs.items()
    ]
    return pytest.mark.parametrize("check", parameters)


@dataclass(frozen=True)
class Declared:
    """The arguments of a call of `conformance`. The decorated test function has them as its attribute `declared`."""

    method: type[Method]
    telling: tuple[str, ...]
    options: Options
    context: Context | None
    checks: Mapping[str, Check]
    """The checks that the test runs, by id."""
    tags: Tags | None = None
    """The tags of the method, or of the preset."""

    def case(self, host: str) -> Case:
        """Return the `Case` of the method on one host, with the options that were passed for it."""
        options = {**self.options.get("*", {}), **self.options.get(host, {})}
        return Case(self.method, ALL_HOSTS[host], options, self.context, self.tags)


def conformance(
    method: str | type[Method],
    *,
    hosts: Iterable[str] | None = None,
    telling: Iterable[str] = TELLING,
    options: Options | None = None,
    expected_failures: Mapping[str, str] | None = None,
    context: Context | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that turns a test function into one pytest test for each check and host. The function gets an argument
    `check`; calling it without arguments runs the check.

    The arguments are those of `check_method`, and `telling`. If `hosts` is not passed, only the hosts in `telling` are
    used. All hosts are used instead if the environment variable PEFTCORE_TEST_ALL is 1, or if PEFTCORE_TEST_CHANGED
    contains the method's name. If a check in `expected_failures` passes, the test fails. Hosts are built, and their
    packages imported, only when a test runs.

    Raises:
        ConfigError: as in `check_method`; it is raised when pytest collects the tests.
    """
    found, told, tags = _method(method, options)
    everything = os.environ.get(ALL) == "1" or found.name in os.environ.get(CHANGED, "").split()
    expected = expected_failures or {}
    named = _named(found, _hosts(hosts), told, expected, context, tags)
    quick = tuple(telling)
    if hosts is None and not everything:
        named = {name: pair for name, pair in named.items() if pair[1].host.name in _telling(pair[0], quick)}

    runs = {name: functools.partial(_run, check, case) for name, (check, case) in named.items()}
    declared = Declared(found, quick, told, context, {name: check for name, (check, _) in named.items()}, tags)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        vars(function)["declared"] = declared
        return parametrized(runs, expected)(function)

    return decorate
