"""The kit's failures teach: each says what failed where, what was found, the usual cause, and what to do. That the
messages of all mutants do is in test_mutants and test_quantizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mutant_base import NOT_MERGEABLE, Small, mutant
from mutants_injection import MUTANTS
from torch import Tensor

from peftcore.author import MethodConfig, Site
from peftcore.errors import ConfigError
from peftcore.testing import (
    APART,
    CHECKS,
    HOSTS,
    QUANTIZER_CHECKS,
    Case,
    Check,
    CheckFailed,
    check_method,
    conformance,
)

ROOT = Path(__file__).parents[2]
BY_NAME = {check.name: check for check in CHECKS}


@pytest.mark.parametrize("check", [*CHECKS, *QUANTIZER_CHECKS], ids=lambda check: check.name)
def test_every_check_has_a_promise_a_usual_cause_and_a_remedy(check: Check) -> None:
    for text in (check.promise, check.cause, check.remedy):
        assert len(text) > 10 and text == text.strip() and not text.endswith(".")
        assert text.count("`") % 2 == 0, "a name without its end"


def test_no_two_checks_promise_the_same() -> None:
    for checks in (CHECKS, QUANTIZER_CHECKS):
        assert len({check.promise for check in checks}) == len(checks)


def test_the_whole_message() -> None:
    method, host = MUTANTS["the_parameter_count_is_the_declared_one"]  # type: ignore[misc]
    check = BY_NAME["the_parameter_count_is_the_declared_one"]
    with pytest.raises(CheckFailed) as failure:
        check(Case(method, HOSTS[host]))
    first, *rest = str(failure.value).splitlines()
    assert first == "miscounts on mlp: the closed formula gives the number of parameters at each site"
    assert [line[:16].strip() for line in rest] == ["found:", "usual cause:", "what to do:", "look closer:"]
    assert rest[0][16:] == "first: 57 declared, 56 there"
    assert (rest[1][16:], rest[2][16:]) == (check.cause, check.remedy)
    command, place = rest[3][16:].split("; the check is in ")
    assert command == f"pytest -k {check.name}"
    file, line = place.split(", line ")
    shown = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1 :]
    assert shown[0].startswith("@check(") and any(f"def {check.name}(" in each for each in shown[:10])


class Raises(Small):
    """Cannot be built."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.size = 1 / len(())


def test_an_error_of_the_method_itself_names_its_line() -> None:
    """Also where the method cannot be applied at all: no failure is a bare traceback."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.startswith("        self.size = 1 /"))
    failed = [each for each in check_method(mutant("raises", Raises), hosts=["mlp"]) if each.status == "failed"]
    assert len(failed) > 40
    told = [each.message for each in failed if "ZeroDivisionError: division by zero" in each.message]
    assert len(told) > 0.9 * len(failed)
    for message in told:
        assert message.startswith("raises on ")
        assert "what to do:" in message and "Traceback" not in message
    named = [each for each in told if f"(test_failures.py, line {line}, in __init__)\n" in each]
    assert len(named) > 0.9 * len(told)
    assert all("what to do:   look at that line first; else " in each for each in named)


class AddsByAlpha(Small):
    """Right, but not in what inductor makes of it."""

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        return torch.add(y, x @ self.A.mT @ self.B.mT, alpha=0.5)


class MultipliesByAlpha(Small):
    """The same, as one product."""

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        rows = torch.addmm(y.flatten(0, -2), x.flatten(0, -2) @ self.A.mT, self.B.mT, alpha=0.5)
        return rows.view(y.shape)


@pytest.mark.slow
@pytest.mark.parametrize("operator", [AddsByAlpha, MultipliesByAlpha])
def test_what_inductor_would_lose_is_named(operator: type[Small]) -> None:
    """Without a C++ compiler, and for what it loses on a GPU alone."""
    method = mutant(operator.__name__.lower(), operator, tags=NOT_MERGEABLE)
    with pytest.raises(CheckFailed, match=r"inductor drops the alpha(.|\n)*alpha: 0\.5"):
        BY_NAME["compiled_equals_eager"](Case(method, HOSTS["bert"]))


def test_hosts_apart_run_where_they_are_named_alone() -> None:
    @conformance("bitfit", hosts=["clip"])
    def named(check: Callable[[], None]) -> None: ...

    @conformance("bitfit")
    def unnamed(check: Callable[[], None]) -> None: ...

    hosts = [{name.rpartition("-")[2] for name in vars(each)["declared"].checks} for each in (named, unnamed)]
    assert hosts[0] == {"clip", "task"} and not APART.keys() & (hosts[1] | HOSTS.keys())
    with pytest.raises(ConfigError, match=r"no host named clap; there are: .*convnet, clip"):
        conformance("bitfit", hosts=["clap"])
