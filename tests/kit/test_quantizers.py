"""Every check of quantizers can fail: for each there is a scheme that fails it and passes all others. The schemes come
as a third party's do, by entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import packed_mutants
import pytest
import toy_quantizer

import peftcore.registry.plugins
from peftcore.errors import ConfigError
from peftcore.testing import QUANTIZER_CHECKS, Check, CheckFailed, NotApplicable, check_quantizer, quantizer_conformance
from peftcore.testing.quantizers import QuantizerCase


def _point(module: ModuleType) -> Any:
    dist = SimpleNamespace(name=f"{module.__name__}-dist", version="1.0")
    return SimpleNamespace(name=module.__name__, value=module.__name__, dist=dist, load=lambda: module)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy and the mutants are all that is installed."""
    points = [_point(toy_quantizer), _point(packed_mutants)]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points if group == "peftcore" else [])
    peftcore.registry.plugins.registry.cache_clear()
    yield
    peftcore.registry.plugins.registry.cache_clear()


def _holds(check: Check, case: QuantizerCase) -> bool:
    try:
        check(case)
    except CheckFailed:
        return False
    except NotApplicable:
        pass
    return True


@quantizer_conformance("toy")
def test_a_scheme_of_one_file_passes(check: Callable[[], None]) -> None:
    check()


def test_there_is_a_mutant_for_each_check() -> None:
    assert sorted(packed_mutants.SCHEMES) == sorted(check.name for check in QUANTIZER_CHECKS)


@pytest.mark.share(3)
@pytest.mark.parametrize("check", QUANTIZER_CHECKS, ids=lambda check: check.name)
def test_the_mutant_fails_its_check_and_no_other(check: Check) -> None:
    case = QuantizerCase(check.name, {})
    with pytest.raises(CheckFailed) as failure:
        check(case)
    for told in (case.name, check.promise, check.cause, check.remedy):
        assert told in str(failure.value)
    others = [other for other in QUANTIZER_CHECKS if other is not check]
    assert [other.name for other in others if not _holds(other, case)] == []


def test_results_state_the_error_and_declared_failures_must_fail() -> None:
    results = {each.check: each for each in check_quantizer("toy", bits=5)}
    assert {each.status for each in results.values()} == {"passed"}
    assert results["what_is_packed_is_read_back"].message.startswith("error 0.0")
    declared = {"pickles_compute_the_same": "a function", "copies_compute_the_same": "none"}
    results = {each.check: each for each in check_quantizer("pickles_compute_the_same", declared=declared)}
    assert results["pickles_compute_the_same"].status == "expected"
    assert results["copies_compute_the_same"].status == "failed"
    assert {each.status for each in results.values()} == {"passed", "expected", "failed"}
    with pytest.raises(ConfigError, match="no_such_check"):
        check_quantizer("toy", declared={"no_such_check": "why"})
    assert len(check_quantizer("toy")) == len(QUANTIZER_CHECKS) >= 19
