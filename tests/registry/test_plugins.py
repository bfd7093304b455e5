"""Plugins are loaded one by one: a broken one is reported with its distribution and version, and the rest works."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from core_toys import Doubling, perceptron
from plugin_toys import Point, names, plugin, point

import peftcore
import peftcore.registry.plugins
from peftcore.author import hookimpl
from peftcore.errors import UnknownMethod
from peftcore.registry.plugins import PluginWarning

pytestmark = pytest.mark.usefixtures("fresh_registry")


def import_failure() -> Any:
    raise ImportError("no module named 'missing_dependency'")


def any_failure() -> Any:
    raise ZeroDivisionError("division by zero")


class NoMapping:
    def __iter__(self) -> Any:
        raise RuntimeError("methods cannot be read")


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "fails at import": (import_failure, "missing_dependency"),
    "raises something else at import": (any_failure, "division by zero"),
    "speaks an older API": (
        lambda: plugin(api=peftcore.author.API - 1),
        "this peftcore has API 2: install another version",
    ),
    "speaks a newer API": (lambda: plugin(api=3), "API 3"),
    "says no API": (lambda: plugin(api=None), "API None"),
    "misspells a hook": (lambda: plugin(peftcore_injekt=hookimpl(lambda model: True)), "peftcore_injekt"),
    "asks for an argument that the hook has not": (lambda: plugin(peftcore_map=hookimpl(lambda modle: None)), "modle"),
    "maps to a class": (lambda: plugin({"toy": Doubling}), "toy"),
    "maps to a place without a class": (lambda: plugin({"toy": "core_toys"}), "toy"),
    "maps from a number": (lambda: plugin({7: "core_toys:Doubling"}), "7"),
    "returns no mapping": (lambda: plugin(NoMapping()), "methods cannot be read"),
    "returns nothing": (lambda: plugin(None), "None"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_plugin_is_one_warning_and_the_rest_works(kind: str, install: Callable[..., None]) -> None:
    load, reason = BROKEN[kind]
    bad = Point("bad", load, SimpleNamespace(name="bad-dist", version="9.9"))
    install(bad, point("good", plugin()))
    with pytest.warns(PluginWarning) as caught:
        listed = names()
    assert listed == ["toy_doubling"]
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "'bad'" in message and "bad-dist 9.9" in message and reason in message
    peftcore.apply(perceptron(), "toy_doubling", target="first")


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_plugin_leaves_no_hook_behind(kind: str, install: Callable[..., None]) -> None:
    load, _ = BROKEN[kind]
    install(Point("bad", load))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)
        registry = peftcore.registry.plugins.registry()
    assert registry.plugins == {}
    assert [name for name, _ in registry.manager.list_name_plugin()] == ["peftcore.core_plugin"]
    registry.manager.check_pending()


def test_warning_comes_once(install: Callable[..., None]) -> None:
    install(Point("bad", import_failure))
    with pytest.warns(PluginWarning):
        peftcore.methods()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftcore.methods()


def test_unknown_method_tells_of_the_plugin_that_failed(install: Callable[..., None]) -> None:
    install(Point("bad", import_failure, SimpleNamespace(name="bad-dist", version="9.9")))
    with pytest.warns(PluginWarning), pytest.raises(UnknownMethod, match=r"bad-dist 9\.9.*missing_dependency"):
        peftcore.method("whatever")


def test_name_of_an_entry_point_counts_once(install: Callable[..., None]) -> None:
    other = plugin({"other": "core_toys:Shift"})
    install(point("same", plugin(), "first-dist", "1.0"), point("same", other, "second-dist", "2.0"))
    with pytest.warns(PluginWarning, match=r"second-dist 2\.0.*taken by first-dist 1\.0"):
        listed = names()
    assert listed == ["toy_doubling"]


@pytest.mark.parametrize("name", ["peftcore.core_plugin", "registered"])
def test_entry_point_cannot_take_a_name_that_the_core_uses(name: str, install: Callable[..., None]) -> None:
    install(point(name, plugin({"other": "core_toys:Shift"}), "bold-dist", "1.0"), point("good", plugin()))
    with pytest.warns(PluginWarning, match=r"bold-dist 1\.0"):
        listed = names()
    assert listed == ["toy_doubling"]
    peftcore.apply(perceptron(), "toy_doubling", target="first")


def test_disabled_plugins_are_not_even_imported(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCORE_DISABLE", "bad, worse")
    install(Point("bad", import_failure), Point("worse", any_failure), point("good", plugin()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        listed = names()
    assert listed == ["toy_doubling"]
