"""Every check can fail: for each there is a mutant that fails it and passes all others."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
from mutant_base import Entry, good

from peftcore.testing import CHECKS, HOSTS, Case, Check, CheckFailed, NotApplicable, checks_learning
from peftcore.testing.kit import ALL, ANYWHERE

MUTANTS: dict[str, Entry] = {}
EMBRACING = ("packed_bases_are_like_dense_ones",)
"""Checks that go through a whole life, and so fail with many a mutant of others."""
ALSO = {
    "factors_are_the_update": ("routed_rows_equal_separate_passes", "assignments_share_a_compiled_graph"),
    "disabling_restores_the_base": ("requires_grad_follows_trainable",),
    "training_leaves_the_base_alone": ("draws_are_declared",),
    "every_trainable_tensor_learns": ("gradients_are_those_of_the_forward",),
    "what_a_schedule_did_is_saved": ("training_resumes_exactly",),
    "training_resumes_exactly": ("what_a_schedule_did_is_saved",),
    "loading_gives_the_same_outputs": ("values_can_be_swapped",),
    "a_file_loads_under_any_name": ("values_can_be_swapped",),
    "changes_show_at_once": ("values_can_be_swapped",),
    "the_state_dict_round_trips": ("changes_show_at_once",),
    "merging_keeps_the_outputs": ("each_pays_for_its_own_rows",),
    "fused_kernels_equal_the_plain_forward": ("every_kind_of_layer_equals_its_effective_weight",),
}
"""What a mutant cannot but fail besides its own check: rows of a batch are computed from the factors; what is left off
cannot be merged; another base gives other outputs; a gradient that is not there is not that of the forward; what no
file has is not there again; what is not loaded right, or not seen when it changes, is not
swapped right; a state dict that loads by half does not show at once; what acts twice costs twice; what forgets its
scale is not its effective weight."""
for _path in sorted(Path(__file__).parent.glob("mutants_*.py")):
    MUTANTS |= importlib.import_module(_path.stem).MUTANTS


def _case(name: str) -> Case:
    method, host, *kind = MUTANTS[name]
    return (kind[0] if kind else Case)(method, ANYWHERE if host == ANYWHERE.name else HOSTS[host])


def _holds(check: Check, case: Case) -> bool:
    try:
        check(case)
    except CheckFailed:
        return False
    except NotApplicable:
        pass
    return True


def _wanted(check: Check, case: Case) -> bool:
    if check.chooses or case.host is ANYWHERE:  # these train for seconds, and look at what the others guard one by one
        return check.chooses and case.host is ANYWHERE
    return check.when(case.tags) and (check.hosts is None or case.host.name in check.hosts)


def test_there_are_forty_checks_and_a_mutant_for_each() -> None:
    names = [check.name for check in CHECKS]
    assert len(names) == len(set(names)) >= 40
    assert sorted(names) == sorted(MUTANTS)


@pytest.mark.share(3)
@pytest.mark.parametrize("host", ["mlp", "encoder", "task"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_the_method_that_mutants_start_from_is_good(check: Check, host: str) -> None:
    case = Case(good, ANYWHERE if host == ANYWHERE.name else HOSTS[host])
    if _wanted(check, case):
        assert _holds(check, case)


def test_a_method_that_is_installed_nowhere_is_tried_on_packed_bases() -> None:
    """Files know methods by name: the check has to make it findable."""
    [check] = [each for each in CHECKS if each.name == "packed_bases_are_like_dense_ones"]
    check(Case(good, HOSTS["llama"]))


@pytest.mark.share(3)
@pytest.mark.parametrize(
    "check",
    [pytest.param(each, marks=pytest.mark.slow if each.cost == "slow" else (), id=each.name) for each in CHECKS],
)
def test_the_mutant_fails_its_check_and_no_other(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick run looks at the others of its family (the module that they stand in), a run of everything at all."""
    monkeypatch.setattr(checks_learning, "TASKS", checks_learning.TASKS[:1])  # it fails on each as on the first
    case = _case(check.name)
    assert _wanted(check, case), "the mutant's tags or host do not call for the check"
    with pytest.raises(CheckFailed) as failure:
        check(case)
    for told in (case.method.name, case.host.name, check.promise, check.cause, check.remedy):
        assert told in str(failure.value)
    failing = (check.name, *ALSO.get(check.name, ()), *EMBRACING)
    others = [other for other in CHECKS if other.name not in failing and _wanted(other, case)]
    if os.environ.get(ALL) != "1":
        others = [other for other in others if other.function.__module__ == check.function.__module__]
    assert [other.name for other in others if not _holds(other, replace(case))] == []
