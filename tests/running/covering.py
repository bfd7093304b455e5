"""Which tests a run has: all of them, a part of them, or those that cover what slow checks of the kit are for.

Slow checks train a model or compile one, and what they find wrong lies nearly always in a kind of operator, seldom in
one method alone. A run has them for methods that changed, and for one method of each kind; those of methods that did
not change are marked as slow (`make test-slow`). The kinds follow from what methods are made of: the core's operator
classes that theirs derive from, trained values of the model itself, and parts that are methods. Of the hosts of other
checks a run has one for each method and check; over all methods each check meets all of its hosts. And of methods that
are made of the same things every fourth one runs a check, other ones for the next check, and as many more are marked as
slow.
"""

from __future__ import annotations

import functools
import os
import sys
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any

import pytest

from peftcore.author import AttentionOperator, Method, Operator, Replacement, Surgeon, WeightOperator
from peftcore.testing.doors import CHANGED, Declared
from peftcore.testing.kit import ALL, Check

PART = "PEFTCORE_TEST_PART"
"""Environment variable: "2/4" runs the second quarter of what would run."""
TOGETHER = (
    "tests/packaging/",
    "plugins/lab/tests/commands/test_compare.py",
    "plugins/lab/tests/comparisons/test_demo.py",
    "tests/torch_interop/test_distributed.py",
)
"""Parts of names of tests that share something that takes long to make: they run in one worker, and in one part."""
SHARE = 4
"""Of so many methods that are made of the same things one runs a check in a quick run and another one in a slow run;
other ones run the next check."""
OPERATORS = (Operator, WeightOperator, AttentionOperator)
"""What operators of methods are; the core has more special ones below these."""
KINDS = {
    Surgeon.replace: Replacement.__name__,
    Surgeon.train: Replacement.__name__,
    Surgeon.include: "parts",
}
"""What a method is made of beside operator classes of its own, by the surgeon's function that it calls."""


def scope(name: str) -> str:
    """What of a test's name stands for all tests that run together with it."""
    return next((shared for shared in TOGETHER if shared in name), name)


def in_part(name: str, part: str) -> bool:
    """Whether the test belongs to the part "i/n"; it does to exactly one of n, the same on every machine.

    Raises:
        pytest.UsageError: `part` is nothing of this kind.
    """
    which, _, parts = part.partition("/")
    if not (which.isdecimal() and parts.isdecimal() and 1 <= int(which) <= int(parts)):
        raise pytest.UsageError(f"{PART}={part}: a part is written as 1/4, the first of four")
    return zlib.crc32(scope(name).encode()) % int(parts) == int(which) - 1


@functools.cache
def kinds(method: type[Method]) -> frozenset[str]:
    """What the method is made of: names of the core's classes of operators, "parts", or "other" when it shows none; of
    one that leaves all to functions of its plugin, what those are made of."""
    own = vars(sys.modules[method.__module__])
    called = _names(method.inject.__code__)
    found = _made(called, own)
    if not found:
        shared = [own[name] for name in called if isinstance(own.get(name), FunctionType)]
        found = set().union(*(_made(_names(each.__code__), vars(sys.modules[each.__module__])) for each in shared))
    return frozenset(found or {"other"})


def _made(called: Collection[str], there: Mapping[str, Any]) -> set[str]:
    """What a function is made of that uses these names, in a module that has these."""
    made = {kind for function, kind in KINDS.items() if function.__name__ in called}
    operators = [each for each in there.values() if isinstance(each, type) and issubclass(each, OPERATORS)]
    core = {next(base for base in each.__mro__ if base.__module__.startswith("peftcore.")) for each in operators}
    return made | {each.__name__ for each in core}


def _names(code: CodeType) -> set[str]:
    """Names that a function uses, those of functions inside it too."""
    inside = [each for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*map(_names, inside))


def representatives(methods: Iterable[type[Method]]) -> set[str]:
    """Names of methods such that each kind has one: the simplest, which is made of least and has the fewest options."""
    simplest = sorted(methods, key=lambda method: (len(kinds(method)), len(method.Config.model_fields), method.name))
    made_of = {method.name: kinds(method) for method in simplest}
    return {next(name for name in made_of if kind in made_of[name]) for kind in set().union(*made_of.values())}


def declared(item: pytest.Item) -> tuple[Declared, Check] | None:
    """What the kit runs in this test; None where it is no test of the kit's."""
    told = getattr(getattr(item, "function", None), "declared", None)
    check = told.checks.get(item.callspec.id) if isinstance(told, Declared) else None  # type: ignore[attr-defined]
    return None if check is None else (told, check)


def mark_slow(items: Iterable[pytest.Item], turn_of: Mapping[str, int]) -> None:
    """Mark as slow tests, which `make test` leaves to `make test-slow`: slow checks of methods that did not change,
    quick ones of methods whose turn is the second; and of a test's parameters all but its share,
    ``pytest.mark.share(3)``: a third of them, the same ones on every machine.
    """
    changed = set(os.environ.get(CHANGED, "").split())
    counted: Counter[str] = Counter()
    for item in items:
        pair, shared = declared(item), item.get_closest_marker("share")
        if turn_of.get(item.nodeid) == 1 or (
            pair is not None and pair[1].cost == "slow" and pair[0].method.name not in changed
        ):
            item.add_marker(pytest.mark.slow)
        elif shared is not None and item.get_closest_marker("slow") is None:
            test = item.nodeid.partition("[")[0]
            counted[test] += 1
            if (counted[test] + zlib.crc32(test.encode())) % shared.args[0]:
                item.add_marker(pytest.mark.slow)


Pair = tuple[pytest.Item, tuple[Declared, Check] | None]


def on_one_host(pairs: Sequence[Pair], whole: Collection[str]) -> list[Pair]:
    """Those without further hosts of a check that another test has on one already; methods in `whole` keep all, and so
    does one that is alone."""
    if len({pair[0].method for _, pair in pairs if pair is not None}) < 2:
        return [*pairs]
    hosts: dict[str, list[pytest.Item]] = {}
    for item, pair in pairs:
        if pair is not None and pair[0].method.name not in whole:
            hosts.setdefault(f"{item.nodeid.partition('[')[0]}/{pair[1].name}", []).append(item)
    kept = {key: of[zlib.crc32(key.encode()) % len(of)].nodeid for key, of in hosts.items()}
    left = {item.nodeid for key, of in hosts.items() for item in of if item.nodeid != kept[key]}
    return [(item, pair) for item, pair in pairs if item.nodeid not in left]


def turns(items: Iterable[pytest.Item]) -> dict[str, int]:
    """Returns, by names of tests, whose turn it is to run a quick check, of methods that are made of the same things: 0
    runs it in a quick run, 1 in a slow one, others in neither. Tests that are not there run always: others, those of
    methods that changed, and all where one method is alone."""
    changed = set(os.environ.get(CHANGED, "").split())
    pairs = [(item, pair) for item in items if (pair := declared(item)) is not None]
    if len({pair[0].method for _, pair in pairs}) < 2:
        return {}
    keys = {item.nodeid: key for item, pair in pairs if (key := _shared(pair, changed))}
    alike: dict[str, set[str]] = {}
    for item, pair in pairs:
        if item.nodeid in keys:
            alike.setdefault(keys[item.nodeid], set()).add(pair[0].method.name)
    turn = {key: _turns(key, names) for key, names in alike.items()}
    return {item.nodeid: turn[keys[item.nodeid]][pair[0].method.name] for item, pair in pairs if item.nodeid in keys}


def _shared(pair: tuple[Declared, Check], whole: Collection[str]) -> str:
    """Returns a name for a quick check of methods that are made of the same things; empty where each has its own."""
    if pair[1].cost != "quick" or pair[0].method.name in whole:
        return ""
    return "/".join([*sorted(kinds(pair[0].method)), pair[1].name])


def _turns(key: str, names: Collection[str]) -> dict[str, int]:
    """Returns the turns of methods; one at least has the first."""
    begin = zlib.crc32(key.encode())
    found = {name: (number + begin) % SHARE for number, name in enumerate(sorted(names))}
    return found if 0 in found.values() else {**found, min(names): 0}


def covering(items: Sequence[pytest.Item], turn_of: Mapping[str, int]) -> list[pytest.Item]:
    """Those that the environment asks for; `turn_of` are the `turns` of all that was collected."""
    pairs: list[Pair] = [(item, declared(item)) for item in items]
    if os.environ.get(ALL) != "1":
        slow = {pair[0].method for _, pair in pairs if pair is not None and pair[1].cost == "slow"}
        changed = set(os.environ.get(CHANGED, "").split())
        chosen = representatives(slow) | changed
        pairs = [
            (item, pair)
            for item, pair in on_one_host(pairs, changed)
            if turn_of.get(item.nodeid, 0) < 2
            and (pair is None or pair[1].cost == "quick" or pair[0].method.name in chosen)
        ]
    part = os.environ.get(PART)
    return [item for item, _ in pairs if not part or in_part(item.nodeid, part)]
