"""What a run leaves to others runs there: parts are disjoint and complete, and every kind of method has one for slow
checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import covering
import pytest

import peftcore.registry.catalogue
from peftcore.testing import CHECKS, conformance
from peftcore.testing.doors import CHANGED
from peftcore.testing.kit import ALL

NAMES = [f"plugins/additive/tests/test_ia3.py::test_conformance[check_{number}-llama]" for number in range(1000)]


def _tests(method: str) -> list[Any]:
    """Stand for what pytest collects of the kit's test of a method."""

    @conformance(method)
    def test(check: Callable[[], None]) -> None: ...

    told = vars(test)["declared"]
    return [
        SimpleNamespace(
            nodeid=f"test_{method}.py::test[{name}]",
            function=test,
            callspec=SimpleNamespace(id=name),
            get_closest_marker=lambda name: None,
        )
        for name in told.checks
    ]


def _chosen(items: list[Any]) -> list[Any]:
    """Those of a quick and of a slow run."""
    return covering.covering(items, covering.turns(items))


def _slow(items: Iterable[Any]) -> set[str]:
    """Names of methods for which slow checks run."""
    pairs = [covering.declared(item) for item in items]
    return {pair[0].method.name for pair in pairs if pair is not None and pair[1].cost == "slow"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (ALL, CHANGED, covering.PART):
        monkeypatch.delenv(variable, raising=False)


def test_each_test_is_in_exactly_one_part() -> None:
    for parts in (1, 3, 4):
        found = [[name for name in NAMES if covering.in_part(name, f"{part}/{parts}")] for part in range(1, parts + 1)]
        assert sorted(name for each in found for name in each) == sorted(NAMES)
        assert min(map(len, found)) > 0.8 * len(NAMES) / parts


def test_a_part_is_the_same_in_every_process() -> None:
    """Also where strings have other hashes."""
    assert [covering.in_part(NAMES[0], f"{part}/4") for part in (1, 2, 3, 4)] == [True, False, False, False]


def test_what_is_collected_here_is_in_exactly_one_part(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = request.session.items
    monkeypatch.setenv(ALL, "1")
    found = []
    for part in (1, 2, 3, 4):
        monkeypatch.setenv(covering.PART, f"{part}/4")
        found += _chosen(collected)
    assert sorted(item.nodeid for item in found) == sorted(item.nodeid for item in collected)


def test_tests_that_share_what_takes_long_are_in_one_part() -> None:
    for shared in covering.TOGETHER:
        names = [f"{shared}::test_{number}" for number in range(50)]
        assert sum(any(covering.in_part(name, f"{part}/4") for name in names) for part in (1, 2, 3, 4)) == 1


@pytest.mark.parametrize("part", ["1", "0/4", "5/4", "a/b", "1/0", "1/4/2", "-1/4"])
def test_a_part_that_is_none_is_refused(part: str) -> None:
    with pytest.raises(pytest.UsageError, match="the first of four"):
        covering.in_part(NAMES[0], part)


def test_every_kind_of_method_has_a_representative() -> None:
    methods = [peftcore.registry.catalogue.method(info.name) for info in peftcore.registry.catalogue.methods()]
    made_of = {method.name: covering.kinds(method) for method in methods}
    of = {
        "lora": "Operator",
        "dora": "WeightOperator",
        "bitfit": "Replacement",
        "child_tuning_d": "Replacement",
        "prefix_tuning": "AttentionOperator",
        "prompt_tuning": "SequenceOperator",
        "mam_adapter": "parts",
        "adaptformer": "Bypass",
    }
    for method, kind in of.items():
        assert kind in made_of[method]
    chosen = covering.representatives(methods)
    assert set().union(*(made_of[name] for name in chosen)) == set().union(*made_of.values())
    assert len(chosen) <= len(set().union(*made_of.values())) < len(methods) / 4
    assert not [name for name, kinds in made_of.items() if "other" in kinds]


def test_slow_checks_run_for_one_method_of_a_kind(quick: None) -> None:
    items = [*_tests("lora"), *_tests("adalora"), *_tests("oft"), *_tests("dora")]
    chosen = _chosen(items)
    assert _slow(items) == {"lora", "adalora", "oft", "dora"}
    assert _slow(chosen) == {"lora", "dora"}
    hosts = {(m.nodeid.partition("[")[0], covering.declared(m)[1].name): m for m in chosen}  # type: ignore[index]
    assert len(hosts) == len(chosen)


def test_each_check_of_a_method_runs_on_one_host_and_over_methods_on_all(quick: None) -> None:
    """Of every second method, that is."""
    names = [info.name for info in peftcore.registry.catalogue.methods() if info.plugin == "reparameterized"]
    items = [item for name in names for item in _tests(name)]
    chosen = _chosen(items)

    def on(host: str, among: Iterable[Any]) -> set[tuple[str, str]]:
        found = ((item.nodeid.partition("[")[0], item.callspec.id.rpartition("-")) for item in among)
        return {(name, check) for name, (check, _, at) in found if at == host}

    both = on("llama", items) & on("encoder", items)
    assert both and not on("llama", chosen) & on("encoder", chosen)
    for check in {check for _, check in both if sum(each == check for _, each in both) > 8}:  # few may meet on one
        assert {name for name, each in on("llama", chosen) if each == check}
        assert {name for name, each in on("encoder", chosen) if each == check}


def test_every_kind_of_method_has_every_quick_check_and_half_of_the_methods_do(quick: None) -> None:
    """What is made of the same things shares the checks; each method has some."""
    names = [
        info.name for info in peftcore.registry.catalogue.methods() if info.plugin in ("reparameterized", "selective")
    ]
    items = [item for name in names for item in _tests(name)]

    def pairs(among: Iterable[Any]) -> set[tuple[str, str]]:
        found = (covering.declared(item) for item in among)
        return {(each[0].method.name, each[1].name) for each in found if each is not None and each[1].cost == "quick"}

    def made(among: set[tuple[str, str]]) -> set[tuple[frozenset[str], str]]:
        return {(covering.kinds(peftcore.registry.catalogue.method(name)), check) for name, check in among}

    turns = covering.turns(items)
    whole, chosen = pairs(items), pairs(_chosen(items))
    quick = pairs(item for item in _chosen(items) if turns.get(item.nodeid, 0) == 0)
    assert quick < chosen < whole and made(quick) == made(whole)
    assert len(quick) < 0.35 * len(whole) and len(chosen) < 0.6 * len(whole)
    for name in names:
        assert sum(each == name for each, _ in quick) > 0.15 * sum(each == name for each, _ in whole), name


def test_what_a_quick_run_has_depends_on_all_that_is_collected_alone(quick: None) -> None:
    """The turns are those of before what is slow was left out."""
    items = [item for info in peftcore.registry.catalogue.methods("selective") for item in _tests(info.name)]
    turns = covering.turns(items)
    run = [[item for item in items if turns.get(item.nodeid, 0) == turn] for turn in (0, 1)]
    together = {item.nodeid for each in run for item in covering.covering(each, turns)}
    assert together == {item.nodeid for item in covering.covering(items, turns)}


def test_a_method_that_changed_runs_on_all_its_hosts(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHANGED, "lora")
    items = [*_tests("lora"), *_tests("dora")]
    chosen = _chosen(items)
    assert [item for item in chosen if "test_lora.py" in item.nodeid] == _as_items("lora", items)
    assert sum("test_dora.py" in item.nodeid for item in chosen) < sum("test_dora.py" in item.nodeid for item in items)


def _as_items(name: str, items: Iterable[Any]) -> list[Any]:
    return [item for item in items if f"test_{name}.py" in item.nodeid]


def test_slow_checks_run_for_methods_that_changed(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHANGED, "adalora oft")
    assert _slow(_chosen([*_tests("lora"), *_tests("adalora"), *_tests("oft")])) == {
        "lora",
        "adalora",
        "oft",
    }


def test_slow_checks_are_slow_tests_unless_their_method_changed(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHANGED, "oft")
    items = [*_tests("lora"), *_tests("oft")]
    marked: list[Any] = []
    for item in items:
        item.add_marker = lambda mark, item=item: marked.append((item, mark.name))
    covering.mark_slow(items, {})
    assert {name for _, name in marked} == {"slow"} and _slow(item for item, _ in marked) == {"lora"}
    assert [item for item, _ in marked] == [item for item in _as_items("lora", items) if _slow([item])]


def test_a_whole_run_leaves_nothing_out(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALL, "1")
    items = [*_tests("lora"), *_tests("adalora")]
    assert _chosen(items) == items


def test_a_method_whose_file_runs_alone_is_checked_whole(quick: None) -> None:
    items = _tests("adalora")
    assert _slow(items) and _chosen(items) == items


def test_tests_that_are_not_the_kits_run_always(quick: None) -> None:
    items: list[Any] = [SimpleNamespace(nodeid=name) for name in NAMES]
    assert _chosen(items) == items


def test_slow_checks_are_those_that_train_or_compile() -> None:
    assert {check.name for check in CHECKS if check.cost == "slow"} == {
        "it_learns",
        "compiled_equals_eager",
        "assignments_share_a_compiled_graph",
    }


def test_a_quick_run_has_a_share_of_many_parameters_and_a_slow_one_the_others(quick: None) -> None:
    marked: list[int] = []

    def item(number: int) -> Any:
        marks = {"share": pytest.mark.share(3).mark} | ({"slow": pytest.mark.slow.mark} if number < 3 else {})
        return SimpleNamespace(
            nodeid=f"test_many.py::test[{number}]",
            get_closest_marker=marks.get,
            add_marker=lambda mark: marked.append(number),
        )

    covering.mark_slow(map(item, range(12)), {})
    left = set(range(3, 12)) - set(marked)
    assert len(left) == 3 and {number % 3 for number in left} == {min(left) % 3}
    assert min(marked) >= 3, "slow ones are slow already"
    covering.mark_slow(map(item, range(12)), {})
    assert left == set(range(3, 12)) - set(marked), "the same ones each time"
